"""A checkpoint that cannot be written costs itself alone; one in the background is named when it is whole."""

import errno
from types import SimpleNamespace

import pytest

from opsd.config.run import CheckpointConfig
from opsd.errors import DataError
from opsd.files import file_sum
from opsd.run_folder import RunFolder
from opsd.saver import Saver


class Learner:
    """Writes a file; it is done after `polls` questions, and `fails` in a way of its own."""

    def __init__(self, polls=0, fails=None):
        self.polls, self.fails = polls, fails

    def save(self, folder, *, in_background):
        self.file = folder / "rank_0.safetensors"
        self.file.write_text("weights")

    def saved(self, *, wait):
        if self.fails:
            raise self.fails
        self.polls -= 1
        return {self.file.name: file_sum(self.file)} if wait or self.polls < 0 else None


def saver_of(tmp_path, learner, **cfg):
    return Saver(folder=RunFolder(str(tmp_path)), learner=learner, cfg=CheckpointConfig(**cfg))


def names(tmp_path):
    return sorted(each.name for each in (tmp_path / "checkpoints").iterdir())


def test_one_in_the_background_gets_its_name_between_later_steps(tmp_path):
    saver = saver_of(tmp_path, Learner(polls=2), in_background=True)
    saver.begin(4, {"step": 4})
    for _ in range(2):
        assert names(tmp_path) == ["unfinished_step_000004"]
        saver.finish(wait=False)
    assert names(tmp_path) == ["step_000004"]
    saver.finish(wait=True)  # there is nothing left to do


def test_the_next_one_waits_for_the_one_before(tmp_path):
    saver = saver_of(tmp_path, Learner(polls=99), in_background=True)
    for step in (2, 4):
        saver.begin(step, {"step": step})
    assert names(tmp_path) == ["step_000002", "unfinished_step_000004"]
    saver.finish(wait=True)
    assert names(tmp_path) == ["step_000002", "step_000004"]


@pytest.mark.parametrize(
    "fails", [DataError("rank_0.safetensors: No space left on device"), OSError(errno.ENOSPC, "No space left on dev")]
)
def test_a_full_disk_leaves_the_one_before_and_no_half_one(tmp_path, capsys, fails):
    learner = Learner()
    saver = saver_of(tmp_path, learner)
    saver.begin(2, {"step": 2})
    learner.fails = fails
    saver.begin(4, {"step": 4})
    assert names(tmp_path) == ["step_000002"] and saver.newest_step is None
    said = capsys.readouterr().err
    assert said.startswith("warning step_000004 was not saved: ") and "No space left on dev" in said
    assert said.endswith(f"{tmp_path} has a checkpoint after step 2, from which resume=auto continues\n")
    learner.fails = None
    saver.begin(6, {"step": 6})
    assert names(tmp_path) == ["step_000002", "step_000006"] and saver.newest_step == 6


def test_a_folder_that_cannot_be_made_is_a_warning_too(tmp_path, capsys):
    (tmp_path / "checkpoints").write_text("a file in its place")
    saver = saver_of(tmp_path, Learner())
    saver.folder = SimpleNamespace(checkpoints=saver.folder.checkpoints, path=tmp_path, newest_step=lambda: None)
    saver.begin(2, {"step": 2})
    assert "warning step_000002 was not saved" in capsys.readouterr().err
