"""A run that is told to stop ends after its step with a checkpoint, says what it leaves, and forgets nothing."""

import os
import signal
from types import SimpleNamespace

import pytest

import opsd.run
from opsd.errors import StageError, reported
from opsd.monitor.jsonl import append_jsonl, read_jsonl
from opsd.monitor.log import MetricsLog
from opsd.run import Run, start_metrics, started
from opsd.run_folder import RunFolder
from opsd.run_state import Ledger, resume
from opsd.stopping import StopRequest, says_what_is_left, stop_signals

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def listening():
    """As a terminal's foreground job, whatever runs the tests."""
    earlier = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


def run_of(num_steps, *, signal_in=(), saves=(), stop):
    """The bookkeeping of a run whose steps do nothing; its process gets a SIGTERM within the steps of `signal_in`."""
    ledger = Ledger(last_step=num_steps)
    saver = SimpleNamespace(newest_step=None, finish=lambda wait: None)
    parts = SimpleNamespace(lock=SimpleNamespace(require=lambda: None))
    run = SimpleNamespace(ledger=ledger, stop=stop, saver=saver, parts=parts, saved=[])

    def save():
        run.saved.append(ledger.done)
        saver.newest_step = ledger.done

    def step_through():
        for step in Run.steps(run):
            if step in signal_in:
                os.kill(os.getpid(), signal.SIGTERM)
            ledger.done = step + 1
            if ledger.done in saves:
                save()

    run.save, run.step_through = save, step_through
    return run


@pytest.mark.parametrize("saves", [(), (3,), (1, 2)])
def test_a_signal_within_a_step_ends_the_run_after_it_with_one_checkpoint_of_it(saves, capfd):
    with stop_signals() as stop:
        run = run_of(6, signal_in=[2], saves=saves, stop=stop)
        run.step_through()
    assert (run.ledger.done, run.saved) == (3, sorted({*saves, 3}))
    assert capfd.readouterr().err == "stopping after this step; Ctrl-C again to end at once\n"


def test_a_run_that_nobody_stops_does_all_its_steps_and_saves_nothing_by_itself():
    with stop_signals() as stop:
        run = run_of(4, stop=stop)
        run.step_through()
    assert (run.ledger.done, run.saved) == (4, [])


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_a_step_and_the_second_time_a_signal_ends_the_run_at_once(number):
    with stop_signals() as stop:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        stop.in_step = True
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.default_int_handler


def test_a_background_job_keeps_ignoring_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_signals() as stop:
        stop.in_step = True
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop.requested


def test_actors_that_the_scheduler_ends_too_are_a_stop_and_no_error(monkeypatch):
    run, ended = SimpleNamespace(stop=StopRequest(), ledger=Ledger(last_step=9, done=4)), []

    def start(cfg, hooks, stack):
        stack.callback(ended.append, "actors")
        return run

    monkeypatch.setattr(opsd.run, "_start", start)
    lost = StageError("learn: worker 0 was lost: it received SIGTERM\na trace")
    with pytest.raises(StageError) as raised, started(None, None):
        assert ended == [], "they work until the block is left"
        raise lost
    assert raised.value is lost and ended == ["actors"]
    with (
        pytest.raises(KeyboardInterrupt, match="^stopped in step 5, which could not end .learn: .* SIGTERM.$"),
        started(None, None),
    ):
        run.stop.requested = True
        raise lost
    assert ended == ["actors"] * 2


def test_what_was_started_ends_where_the_rest_does_not_start(monkeypatch):
    ended = []

    def start(cfg, hooks, stack):
        stack.callback(ended.append, "actors")
        raise StageError("resume: no such checkpoint")

    monkeypatch.setattr(opsd.run, "_start", start)
    with pytest.raises(StageError, match="no such checkpoint"), started(None, None):
        pass
    assert ended == ["actors"]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([], "stopped: there is no checkpoint in {}, so resume=auto starts again at step 0\n"),
        ([5, 20], "stopped: {} has a checkpoint after step 20, from which resume=auto continues\n"),
    ],
)
def test_the_last_line_says_what_there_is_to_go_on_from(tmp_path, capsys, steps, said):
    folder = RunFolder(str(tmp_path))
    for step in steps:
        folder.checkpoints.finish(folder.checkpoints.begin(step), {"step": step}, {}, keep=2)
    folder.checkpoints.begin(30)  # interrupted
    with pytest.raises(SystemExit) as ended, reported(), says_what_is_left(str(tmp_path)):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == said.format(tmp_path)


def test_lines_that_a_resumed_run_writes_again_stay_in_a_file_of_another_name(tmp_path):
    """With and without a checkpoint, and again when that happens again."""
    path = tmp_path / "metrics.jsonl"
    for step in range(112):
        append_jsonl(path, {"step": step, "loss": 1.0})
    log = MetricsLog(tmp_path, "off", "p", "r", {})
    assert log.truncate_after(200) == []
    assert log.truncate_after(100) == [tmp_path / "metrics.replaced_1.jsonl"]
    assert len(read_jsonl(path)) == 101
    assert log.truncate_after(-1) == [tmp_path / "metrics.replaced_2.jsonl"]
    assert read_jsonl(path) == []
    assert [len(read_jsonl(tmp_path / f"metrics.replaced_{number}.jsonl")) for number in (1, 2)] == [112, 101]


def test_a_run_without_a_checkpoint_says_that_it_begins_again_and_keeps_its_metrics(tmp_path, capsys):
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 0, "eval/accuracy": 0.5})
    (tmp_path / "summary.json").write_text("{}")
    parts = SimpleNamespace(cfg=SimpleNamespace(resume="auto"), folder=RunFolder(str(tmp_path)))
    ledger = Ledger(last_step=9)
    resumed = resume(parts, ledger)
    start_metrics(parts, ledger, MetricsLog(tmp_path, "off", "p", "r", {}), resumed=resumed)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"resume  there is no checkpoint in {tmp_path}: from step 0"
    assert said[1].endswith("the earlier ones stay in metrics.replaced_1.jsonl")
    assert read_jsonl(tmp_path / "metrics.jsonl") == []
    assert not (tmp_path / "summary.json").exists()
