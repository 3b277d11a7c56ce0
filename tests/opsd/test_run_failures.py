"""The whole loop with stand-ins: steps that are skipped, and files that cannot be written."""

import json
from dataclasses import replace

import pytest

import opsd.monitor.log
import opsd.run
from opsd.config.run import CheckpointConfig, LearnerConfig
from opsd.errors import StageError
from opsd.hooks import build_hooks
from opsd.monitor.jsonl import read_jsonl
from opsd.run_folder import RunFolder
from opsd.types import StepReport
from tests.opsd import test_run_stops as runs

stand_ins = runs.stand_ins  # the fixture
NUM_TOKENS = 14


@pytest.fixture
def skipping(monkeypatch):
    """Called with steps: those of them have a loss that is not finite. Returns the losses that a method sees."""
    seen = []

    def skip(*steps):
        def train_step(self, scored, selection):
            self.steps_seen += 1
            bad = self.steps_seen in steps
            return StepReport(
                loss=float("nan") if bad else float(self.steps_seen), grad_norm=1.0, learning_rate=1e-3,
                num_kept=NUM_TOKENS, num_trunk_tokens=20, skipped="the loss is nan" if bad else "",
            )  # fmt: skip

        monkeypatch.setattr(runs.Part, "train_step", train_step)
        told = lambda cfg: replace(build_hooks(cfg), after_step=lambda report: seen.append(report.loss))  # noqa: E731
        monkeypatch.setattr(runs, "build_hooks", told)
        return seen

    return skip


def said(capfd, *beginnings):
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith(beginnings)]


def test_skipped_steps_are_counted_and_teach_neither_student_nor_method(stand_ins, skipping, tmp_path, capfd):
    seen = skipping(2, 3, 5)
    assert runs.start(tmp_path, learner=LearnerConfig(max_skipped_steps=2)) == 0
    assert seen == [1.0, 4.0, 6.0]
    lines = [line for line in read_jsonl(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["loss"] for line in lines] == [1.0, None, None, 4.0, None, 6.0]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 2, 3, 3]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["skipped_steps"], summary["tokens_trained"]) == (6, 3, 3 * NUM_TOKENS)
    assert said(capfd, "skipped") == [
        f"skipped step {step}: the loss is nan; weights and optimiser are as before it ({row} of 2 in a row)"
        for step, row in ((2, 1), (3, 2), (5, 1))
    ]


def test_too_many_skipped_steps_in_a_row_end_the_run_also_across_a_resume(stand_ins, skipping, tmp_path, capfd):
    skipping(3, 4, 5, 6)
    saves = {"checkpoint": CheckpointConfig(every=2)}
    for resume in ("never", "auto"):
        assert runs.start(tmp_path, resume=resume, **saves) == 2
        assert said(capfd, "error") == [
            "error: learn: step 6: the loss is nan: 4 in a row, and at most learner.max_skipped_steps=3 are skipped; "
            f"{tmp_path} has a checkpoint after step 4, from which resume=auto continues"
        ]
    assert not (tmp_path / "summary.json").exists()


def test_none_is_skipped_where_the_setting_says_so(stand_ins, skipping, tmp_path, capfd):
    skipping(1)
    assert runs.start(tmp_path, learner=LearnerConfig(max_skipped_steps=0)) == 2
    [line] = said(capfd, "error")
    assert line.endswith(f"there is no checkpoint in {tmp_path}, so resume=auto starts again at step 0")


def no_room(*_, **__):
    raise OSError(28, "No space left on device", "/full")


def test_a_run_goes_on_without_its_lines_and_its_report(stand_ins, monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(opsd.monitor.log, "append_jsonl", no_room)
    monkeypatch.setattr(opsd.run, "build_report", no_room)
    assert runs.start(tmp_path) == 0
    assert said(capfd, "warning", "error") == [
        f"warning: {what} failed, and the run goes on: OSError: [Errno 28] No space left on device: '/full'"
        for what in ("metrics.jsonl", "tokens.jsonl", "the report")
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["warnings"] == {"metrics.jsonl": 10, "tokens.jsonl": 2}  # six steps and four evaluations


@pytest.mark.parametrize("broken", ["summary", "student", "both"])
def test_what_is_left_at_the_end_is_written_where_another_part_of_it_fails(
    stand_ins, broken, monkeypatch, tmp_path, capfd
):
    saved = []

    def save_student(self, folder):
        if broken != "summary":
            raise StageError(f"export: the student could not be written to {folder}")
        saved.append(folder)

    monkeypatch.setattr(runs.Part, "save_student", save_student, raising=False)
    if broken != "student":
        monkeypatch.setattr(RunFolder, "write_summary", no_room)
    assert runs.start(tmp_path) == 2
    reasons = {
        "summary": ["[Errno 28] No space left on device: '/full'"],
        "student": [f"export: the student could not be written to {tmp_path}/student"],
    }
    reasons["both"] = reasons["summary"] + reasons["student"]
    assert said(capfd, "error") == [
        f"error: {'; '.join(reasons[broken])}; {tmp_path}/checkpoints/step_000006 has the weights: python "
        f"scripts/export.py {tmp_path} OUT"
    ]
    assert saved == ([tmp_path / "student"] if broken == "summary" else [])
    assert (tmp_path / "summary.json").exists() == (broken == "student")
    assert (tmp_path / "report.html").exists()


def test_an_evaluation_that_was_made_before_a_kill_is_not_made_again(stand_ins, tmp_path):
    """After the last checkpoint, and one that the stopped run owed and a resumed one has made before it was killed."""
    assert runs.start(tmp_path / "whole") == 0
    expected = runs.lines(tmp_path / "whole")
    (tmp_path / "whole" / "summary.json").unlink()
    assert runs.start(tmp_path / "whole", resume="auto") == 0
    assert runs.lines(tmp_path / "whole") == expected
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (summary["reverse_kl_after"], summary["accuracy_after"]) == (0.5, None)
    assert runs.start(tmp_path / "killed", signals={3: 1}) == 130
    assert runs.start(tmp_path / "killed", signals={4: 2}, resume="auto") == 130
    assert runs.start(tmp_path / "killed", resume="auto") == 0
    assert runs.lines(tmp_path / "killed") == expected
