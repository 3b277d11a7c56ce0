"""Phase seconds, metrics.jsonl with and without wandb, and the progress line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opsd.monitor.jsonl import read_jsonl
from opsd.monitor.log import PHASES, MetricsLog, PhaseTimer, ProgressBar, progress_summary
from opsd.monitor.wandb import wandb_modes

REPOSITORY = Path(__file__).parents[3]


class Clock:
    """Time that passes only when told to."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_python(code, **environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(REPOSITORY), "NETRC": os.devnull, **environment},
        capture_output=True,
        text=True,
    )


def test_phases_add_up_to_the_wall_time_of_the_loop():
    clock = Clock()
    timer = PhaseTimer(clock)
    clock.now_s += 7  # before the loop: nobody's time
    timer.start()
    for seconds in (3.0, 2.0):
        with timer.phase("rollout"):
            clock.now_s += seconds
    clock.now_s += 0.5
    with timer.phase("learn"):
        clock.now_s += 4
    totals = timer.totals()
    assert totals == {"rollout": 5, "score": 0, "select": 0, "learn": 4, "sync": 0, "evaluate": 0, "other": 0.5}
    assert sum(totals.values()) == 9.5


def test_take_returns_only_the_seconds_since_the_last_take():
    clock = Clock()
    timer = PhaseTimer(clock)
    timer.start()
    with timer.phase("score"):
        clock.now_s += 2
    assert timer.take() == {**dict.fromkeys(PHASES, 0.0), "score": 2.0}
    with timer.phase("score"):
        clock.now_s += 1
    assert timer.take()["score"] == 1.0
    assert timer.totals()["score"] == 3.0


def test_a_phase_that_raises_is_still_timed_and_closed():
    clock = Clock()
    timer = PhaseTimer(clock)
    timer.start()
    with pytest.raises(RuntimeError), timer.phase("sync"):
        clock.now_s += 2
        raise RuntimeError("lost a worker")
    with timer.phase("sync"):
        clock.now_s += 1
    assert timer.totals()["sync"] == 3.0


def test_nested_and_unknown_phases_are_refused():
    timer = PhaseTimer()
    with pytest.raises(AssertionError, match="inside phase rollout"), timer.phase("rollout"), timer.phase("score"):
        pass
    with pytest.raises(AssertionError, match="must be one of"), timer.phase("lunch"):
        pass


def test_every_logged_step_can_be_read_at_once_and_a_resume_forgets_later_ones(tmp_path):
    log = MetricsLog(tmp_path, "off", "opsd", "run", {})
    for step in range(1, 5):
        log.log(step, {"loss": 1.0 / step, "accuracy_train": float("nan")})
        assert read_jsonl(log.path)[-1] == {"step": step, "loss": 1.0 / step, "accuracy_train": None}
    log.truncate_after(2)
    log.log(3, {"loss": 0.5})
    assert [(line["step"], line["loss"]) for line in read_jsonl(log.path)] == [(1, 1.0), (2, 0.5), (3, 0.5)]
    log.close()


def test_a_resumed_run_finds_the_evaluation_that_was_already_made(tmp_path):
    log = MetricsLog(tmp_path, "off", "opsd", "run", {})
    assert log.evaluation_at(4) is None
    log.log(4, {"loss": 0.5})
    assert log.evaluation_at(4) is None
    log.log(4, {"eval/accuracy": None, "eval/reverse_kl": 0.25})
    log.log(5, {"loss": 0.5})
    assert log.evaluation_at(4) == {"accuracy": None, "reverse_kl": 0.25}
    log.close()


def test_wandb_is_not_imported_where_it_is_off(tmp_path):
    code = f"""
import sys
from pathlib import Path
from opsd.monitor.log import MetricsLog
log = MetricsLog(Path({str(tmp_path)!r}), "off", "opsd", "run", {{}})
log.log(1, {{"loss": 1.0}})
log.close()
assert "wandb" not in sys.modules
"""
    result = run_python(code, WANDB_API_KEY="x" * 40)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("files", "environment", "modes"),
    [
        ({}, {}, ("offline",)),
        ({}, {"WANDB_API_KEY": "a" * 40}, ("online", "offline")),
        ({}, {"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "offline"}, ("offline",)),
        ({}, {"WANDB_API_KEY": "a" * 40, "WANDB_MODE": "disabled"}, ("disabled",)),
        ({}, {"WANDB_MODE": "online"}, ("online", "offline")),
        ({}, {"WANDB_MODE": "dryrun"}, ("offline",)),
        ({"netrc": f"machine api.wandb.ai login user password {'b' * 40}"}, {}, ("online", "offline")),
        ({"netrc": f"machine other.host login user password {'b' * 40}"}, {}, ("offline",)),
        ({"settings": f"[default]\napi_key = {'c' * 40}"}, {}, ("online", "offline")),
        ({"settings": "[default]\nmode = offline"}, {"WANDB_API_KEY": "a" * 40}, ("offline",)),
        ({"settings": "[default]\nmode = offline"}, {"WANDB_MODE": "online"}, ("online", "offline")),
    ],
)
def test_what_wandb_has_been_told_wins_over_a_guess(tmp_path, monkeypatch, files, environment, modes):
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "NETRC": f"{tmp_path}/netrc", "WANDB_CONFIG_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    wandb.teardown()  # it reads its settings once
    assert wandb_modes() == modes
    wandb.teardown()


@pytest.mark.slow
def test_wandb_offline_keeps_its_files_in_the_run_and_its_death_does_not_end_ours(tmp_path):
    """The wandb process is killed between two steps, as an out-of-memory killer would; no API key, no network."""
    code = f"""
import os, signal
from pathlib import Path
from opsd.monitor.log import MetricsLog
log = MetricsLog(Path({str(tmp_path)!r}), "auto", "opsd", "run", {{"seed": 0}})
log.log(1, {{"loss": 1.0, "accuracy_train": None}})
children = " ".join(path.read_text() for path in Path("/proc/self/task").glob("*/children")).split()
for pid in children:
    if "wandb" in Path(f"/proc/{{pid}}/comm").read_text():
        os.kill(int(pid), signal.SIGKILL)
for step in range(2, 30):
    log.log(step, {{"loss": 1.0}})
log.log_report(log.path)
log.close()
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "going on without it" in result.stderr
    assert result.stdout == ""
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 30))
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_a_wandb_server_that_cannot_be_reached_means_an_offline_run(tmp_path):
    """Twice, as a run and its resumption: both record under one wandb id."""
    code = f"""
from pathlib import Path
import opsd.monitor.log, opsd.monitor.wandb
opsd.monitor.wandb.WANDB_INIT_TIMEOUT_S = 2.0
for step in (1, 2):
    log = opsd.monitor.log.MetricsLog(Path({str(tmp_path)!r}), "auto", "opsd", "run", {{"seed": 0}})
    log.log(step, {{"loss": 1.0}})
    log.close()
"""
    result = run_python(code, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    assert "wandb cannot start online" in result.stderr
    assert "wandb cannot start offline" not in result.stderr
    assert len({path.name for path in (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")}) == 1
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.slow
def test_wandb_gets_the_configuration_the_token_table_and_the_report(tmp_path):
    """Read back from the offline run's own files, as `wandb sync` would."""
    report = tmp_path / "report.html"
    report.write_text("<html>curves</html>")
    code = f"""
from pathlib import Path
from opsd.monitor.log import MetricsLog
log = MetricsLog(Path({str(tmp_path)!r}), "auto", "opsd", "run", {{"selector": {{"ratio": 0.2}}}})
log.log_tokens([
    {{"step": 3, "tokens": ["4", "+"], "entropy": [0.5, 0.25], "reverse_kl": [1.5, 0.0], "quadrant": [1, 2],
      "weight": [1.0, 0.0]}},
    {{"step": 3, "tokens": ["="], "entropy": [0.0], "reverse_kl": [0.125], "quadrant": [3], "weight": [2.0]}},
])
log.log_tokens([])
log.log_report(Path({str(report)!r}))
log.close()
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in read_jsonl(tmp_path / "tokens.jsonl")] == [3, 3]
    [record] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b'"ratio":0.2' in record.read_bytes().replace(b" ", b"")
    media = record.parent / "files" / "media"
    [table] = media.glob("table/tokens_*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["step", "rollout", "position", "token", "entropy", "reverse_kl", "quadrant", "weight"],
        "data": [
            [3, 0, 0, "4", 0.5, 1.5, 1, 1.0],
            [3, 0, 1, "+", 0.25, 0.0, 2, 0.0],
            [3, 1, 0, "=", 0.0, 0.125, 3, 2.0],
        ],
    }
    [page] = media.glob("html/report_*.html")
    assert page.read_text() == report.read_text()


def test_without_a_terminal_the_progress_is_a_few_plain_lines():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(100, 0, stream, clock)
    bar.set_accuracy(0.715)
    for _ in range(100):
        bar.update({"loss": 0.0821, "kept_ratio": 0.5})
    bar.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/100" for step in range(10, 101, 10)]
    assert lines[0] == "step 10/100  loss 0.0821  kept 50%  acc 71.5%"
    assert "\r" not in stream.getvalue()


def test_slow_steps_print_a_line_every_30_seconds_and_a_resumed_run_counts_on():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(1000, 400, stream, clock)
    for _ in range(8):
        clock.now_s += 10
        bar.update({"loss": 1.0})
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["403/1000", "406/1000"]


def test_on_a_terminal_the_bar_shows_the_numbers():
    stream = Terminal()
    bar = ProgressBar(10, 4, stream, Clock())
    bar.update({"loss": 0.5})
    bar.close()
    assert "5/10" in stream.getvalue()
    assert "loss 0.5000" in stream.getvalue()


def test_the_summary_leaves_out_what_was_not_measured():
    values = {"loss": None, "tokens_per_s": 1240.0, "phase_s/rollout": 2.06, "phase_s/score": 0.8, "phase_s/learn": 1.9}
    assert progress_summary(values, None) == "1,240 tok/s  rollout 2.1s  score 0.8s  learn 1.9s"
