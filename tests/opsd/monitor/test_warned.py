"""What cannot be written costs a line on the terminal, never the run."""

import pytest

from opsd.monitor.log import MetricsLog
from opsd.monitor.warned import Warned


def test_a_failure_is_said_once_per_kind_and_counted(capsys):
    warned = Warned()
    for number in range(3):
        with warned.optional("metrics.jsonl"):
            raise OSError(28, "No space\nleft on device", f"/full/{number}")
    with warned.optional("the report"):
        raise KeyError("loss")
    with warned.optional("the report"):
        pass
    assert capsys.readouterr().err.splitlines() == [
        "warning: metrics.jsonl failed, and the run goes on: OSError: [Errno 28] No space left on device: '/full/0'",
        "warning: the report failed, and the run goes on: KeyError: 'loss'",
    ]
    assert warned.counts == {"metrics.jsonl": 3, "the report": 1}


def test_ctrl_c_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt), Warned().optional("wandb"):
        raise KeyboardInterrupt


class Broken:
    """Metrics of Ray or a wandb run that fail whatever is asked of them."""

    def __getattr__(self, name):
        def fail(*_):
            raise ConnectionError(f"{name}: gone")

        return fail


def test_one_destination_that_fails_does_not_keep_the_others_from_a_record(tmp_path, capsys):
    warned = Warned()
    log = MetricsLog(tmp_path / "run", "off", "opsd", "run", {}, Broken(), warned)
    log._wandb = Broken()
    (tmp_path / "run" / "tokens.jsonl").mkdir()  # nothing can be appended to it
    log.log(1, {"loss": 0.5})
    log.log_tokens([{"step": 1}])
    log.log_report(tmp_path / "report.html")
    assert log.path.read_text() == '{"step": 1, "loss": 0.5}\n'
    assert warned.counts == {"Ray's metrics": 1, "wandb": 3, "tokens.jsonl": 1}
    assert len(capsys.readouterr().err.splitlines()) == 3
