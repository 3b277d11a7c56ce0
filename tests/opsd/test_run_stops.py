"""The whole loop with stand-ins for engines and learner: stopped within a step, resumed, and with no checkpoint."""

import json
import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import opsd.run
import opsd.run_parts
from opsd.batch import PendingScores
from opsd.checkpoints import read_state
from opsd.config.engine import EngineSpec, RolloutConfig, TeacherConfig
from opsd.config.placement import ScheduleConfig
from opsd.config.run import CheckpointConfig, DataConfig, EvalConfig, LogConfig, RunConfig, StudentConfig
from opsd.errors import reported
from opsd.evaluation.held_out import Evaluation
from opsd.files import file_sum
from opsd.hooks import build_hooks
from opsd.monitor.jsonl import read_jsonl
from opsd.run import started
from opsd.stopping import says_what_is_left
from opsd.train import loop
from opsd.types import StepReport, Vocabulary
from tests.opsd.builders import Answers, kept_here, scored_rollouts

VOCABULARY = Vocabulary(size=40, stop_ids=(0,))
ITEMS = scored_rollouts([5, 3, 4, 2], VOCABULARY)


class Part:
    """A pool, a teacher or a learner that does as little as the loop lets it."""

    busy_s: dict = {}
    num_restarts = 0

    def __init__(self, *_, **__):
        self.policy_version, self.steps_seen = -1, 0

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def sample(self, prompts, *, samples_per_prompt, step):
        yield dict(enumerate(item.rollout for item in ITEMS))

    def begin(self, groups):
        return [
            PendingScores(
                rollouts=group,
                scored_places=tuple(group),
                parts=kept_here(list(group.values()), [ITEMS[place].scores for place in group], VOCABULARY),
                engines=Answers(),
                teacher="t",
            )  # fmt: skip
            for group in groups
        ]

    def train_step(self, scored, selection):
        self.steps_seen += 1
        return StepReport(
            loss=float(self.steps_seen), grad_norm=1.0, learning_rate=1e-3, num_kept=14, num_trunk_tokens=20
        )

    def save(self, folder, *, in_background):
        self.saving = folder / "seen"
        self.saving.write_text(str(self.steps_seen))

    def saved(self, *, wait):
        return {"seen": file_sum(self.saving)}

    def load(self, folder):
        self.steps_seen = int((folder / "seen").read_text())


@pytest.fixture
def stand_ins(monkeypatch):
    prompts = [item.rollout.prompt for item in ITEMS]
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "?")
    setup = SimpleNamespace(
        tokenizer=tokenizer, vocabulary=VOCABULARY, train_prompts=prompts, eval_prompts=prompts, device="cpu",
        support="teacher", prompt_lines=[], teachers={}, adapter=None, agents=None,
        student=EngineSpec(
            path="s", config=RolloutConfig(), vocabulary=VOCABULARY, device="cpu", max_model_tokens=64
        ),
    )  # fmt: skip

    @contextmanager
    def no_cluster(**_):
        yield ""

    figures = Evaluation(accuracy=None, reverse_kl=0.5, top1_agreement=0.5, response_length=3.0, truncated=0.0)
    for name, stand_in in {
        "check": lambda cfg: setup, "ray_cluster": no_cluster, "metrics_url": lambda: "http://127.0.0.1:1/metrics",
        "Placement": Part, "RolloutPool": Part, "start_teachers": Part, "LearnerGroup": Part, "RayMetrics": Part,
        "check_agreement": lambda *_: None, "weight_sync": lambda *_, **__: lambda version: None,
        "evaluate": lambda *_, **__: figures,
        "build_report": lambda folder: (folder / "report.html").write_text("report") and folder / "report.html",
    }.items():  # fmt: skip
        module = opsd.run if hasattr(opsd.run, name) else opsd.run_parts
        monkeypatch.setattr(module, name, stand_in)
    earlier = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


def start(folder, *, signals=(), **changes):
    """The exit code of a run of six steps. `signals`: how many its process gets within each step, by step."""
    cfg = RunConfig(
        output_dir=str(folder), num_steps=6, student=StudentConfig(path="s"), teacher=TeacherConfig(path="t"),
        data=DataConfig(train_path="a", eval_path="b", prompts_per_step=4), log=LogConfig(wandb="off"),
        eval=EvalConfig(every=2), **changes,
    )  # fmt: skip
    hooks = build_hooks(cfg)

    def select(batch):
        for _ in range(dict(signals).get(batch.step, 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        return hooks.select(batch)

    told = SimpleNamespace(**{**vars(hooks), "select": select})
    try:
        with reported(), says_what_is_left(cfg.output_dir), started(cfg, told) as run:
            loop(run)
            run.finish()
    except SystemExit as ended:
        return ended.code
    return 0


def lines(folder, name="metrics.jsonl"):
    """(step, what was logged) of each line."""
    return [(line["step"], line.get("loss", "evaluation")) for line in read_jsonl(folder / name)]


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_stopped_and_resumed_run_has_the_lines_of_an_unbroken_one(ahead, stand_ins, tmp_path, capfd):
    """Stopped in the fourth step, after which an evaluation is due: the resumed run makes it."""
    schedule = ScheduleConfig(max_staleness=ahead)
    assert start(tmp_path / "whole", schedule=schedule) == 0
    whole = lines(tmp_path / "whole")
    assert whole == [
        (0, "evaluation"), (1, 1.0), (2, 2.0), (2, "evaluation"), (3, 3.0), (4, 4.0), (4, "evaluation"), (5, 5.0),
        (6, 6.0), (6, "evaluation"),
    ]  # fmt: skip
    folder = tmp_path / "stopped"
    capfd.readouterr()
    assert start(folder, signals={3: 1}, schedule=schedule) == 130
    said = capfd.readouterr().err.splitlines()
    assert ("stop    the answers of 2 steps to come are dropped; resume=auto makes new ones" in said) == bool(ahead)
    assert "stopping after this step; Ctrl-C again to end at once" in said
    assert said[-1] == (
        f"stopped after step 4 of 6: {folder} has a checkpoint after step 4, from which resume=auto continues"
    )
    assert lines(folder) == whole[:6]
    assert (folder / "report.html").exists() and not (folder / "summary.json").exists()
    [checkpoint] = (folder / "checkpoints").glob("step_*")
    assert read_state(checkpoint)["prompt_position"] == 4 * 4  # whatever was made ahead
    assert start(folder, resume="auto", schedule=schedule) == 0
    assert lines(folder) == whole
    assert not list(folder.glob("*.replaced_*"))
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["student"], summary["teacher"], summary["support"]) == (6, "s", "t", "teacher")
    assert (summary["selector"], summary["ratio"]) == (None, None)


def test_a_second_signal_ends_at_once_and_the_metrics_of_a_run_without_a_checkpoint_stay(stand_ins, tmp_path, capfd):
    assert start(tmp_path, signals={2: 2}, overwrite=False) == 130
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"stopped: there is no checkpoint in {tmp_path}, so resume=auto starts again at step 0"
    )
    before = lines(tmp_path)
    assert [step for step, _ in before] == [0, 1, 2, 2]
    assert start(tmp_path, resume="auto") == 0
    assert lines(tmp_path, "metrics.replaced_1.jsonl") == before
    assert [step for step, _ in lines(tmp_path)] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_a_signal_in_the_last_step_changes_nothing(stand_ins, tmp_path):
    assert start(tmp_path, signals={5: 1}) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6


def test_after_a_crash_the_lines_beyond_the_checkpoint_stay_in_another_file(stand_ins, tmp_path):
    saves = {"checkpoint": CheckpointConfig(every=2)}
    assert start(tmp_path, signals={3: 2}, **saves) == 130  # at once, so with the checkpoint after step 2 only
    assert start(tmp_path, resume="auto", **saves) == 0
    assert [step for step, _ in lines(tmp_path, "metrics.replaced_1.jsonl")][-1] == 3
    assert [loss for _, loss in lines(tmp_path) if loss != "evaluation"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
