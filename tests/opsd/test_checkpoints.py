"""A checkpoint is whole or none: an interrupted, a half-deleted and a damaged one are never taken for one."""

import json
import shutil

import pytest

from opsd.checkpoints import Checkpoints, learner_sums, read_state, require_whole, step_of
from opsd.errors import DataError
from opsd.files import file_sum


def save(checkpoints, step, keep=9, keep_best=False, **state):
    """A checkpoint with one file of a learner."""
    unfinished = checkpoints.begin(step)
    shard = unfinished / "learner" / "rank_0.safetensors"
    shard.write_bytes(bytes([step]) * 100)
    sums = {shard.name: file_sum(shard)}
    return checkpoints.finish(unfinished, {"step": step, **state}, sums, keep=keep, keep_best=keep_best)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def steps(checkpoints):
    return [step_of(each) for each in checkpoints.finished()]


def test_the_newest_finished_one_is_found_and_older_ones_go(checkpoints):
    assert checkpoints.newest() is None
    for step in (5, 10, 100):
        save(checkpoints, step, keep=2)
    checkpoints.begin(200)  # never finished
    assert read_state(checkpoints.newest()) == {"step": 100}
    assert steps(checkpoints) == [10, 100]
    assert learner_sums(checkpoints.newest()).keys() == {"rank_0.safetensors"}


def test_steps_are_ordered_as_numbers(checkpoints):
    for step in (999_999, 1_000_000):
        (checkpoints.path / f"step_{step:06d}").mkdir(parents=True)
    assert step_of(checkpoints.newest()) == 1_000_000


def test_the_best_one_stays_though_it_is_old(checkpoints):
    for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, 0.7), (5, None)):
        save(checkpoints, step, keep=1, keep_best=True, score=score)
    assert steps(checkpoints) == [2, 5]


def test_a_step_that_is_saved_again_replaces_the_first(checkpoints):
    save(checkpoints, 3, attempt=1)
    save(checkpoints, 3, attempt=2)
    assert read_state(checkpoints.newest())["attempt"] == 2
    assert [each.name for each in checkpoints.path.iterdir()] == ["step_000003"]


def test_what_a_kill_leaves_of_one_that_was_being_deleted_is_none(checkpoints, monkeypatch):
    save(checkpoints, 1)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_into = checkpoints.path / "unfinished_step_000002"
        (save_into / "learner").mkdir(parents=True)
        checkpoints.finish(save_into, {"step": 2}, {"rank_0.safetensors": {"bytes": 0, "sha256": ""}}, keep=1)
    monkeypatch.undo()
    assert steps(checkpoints) == [2]
    checkpoints.clean()
    assert [each.name for each in checkpoints.path.iterdir()] == ["step_000002"]


DAMAGES = {
    "a file cut": (lambda c: (c / "learner" / "rank_0.safetensors").write_bytes(b"x"), "has 1 bytes, 100 were written"),
    "a file gone": (lambda c: (c / "learner" / "rank_0.safetensors").unlink(), "rank_0.safetensors cannot be read"),
    "a byte flipped": (
        lambda c: (c / "learner" / "rank_0.safetensors").write_bytes(b"\7" * 99 + b"x"),
        "rank_0.safetensors has other contents than were written",
    ),
    "the learner gone": (lambda c: shutil.rmtree(c / "learner"), "rank_0.safetensors cannot be read"),
    "no state": (lambda c: (c / "state.json").unlink(), "state.json cannot be read"),
    "an empty state": (lambda c: (c / "state.json").write_text("{}"), "state.json has 2 bytes"),
    "another state": (lambda c: (c / "state.json").write_text('{"step": 8}'), "state.json has other contents"),
    "a binary state": (lambda c: (c / "state.json").write_bytes(b"\xff" * 11), "state.json has other contents"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing: .* an earlier version"),
    "an empty manifest": (lambda c: (c / "manifest.json").write_text(""), "manifest.json: cannot read it"),
    "a manifest of nothing": (lambda c: (c / "manifest.json").write_text("{}"), "manifest.json: expected the files"),
    "a manifest that is a list": (lambda c: (c / "manifest.json").write_text("[]"), "expected a JSON object"),
    "a binary manifest": (lambda c: (c / "manifest.json").write_bytes(b"\xff\0"), "manifest.json: cannot read it"),
    "a manifest without the learner": (
        lambda c: (c / "manifest.json").write_text(
            json.dumps({"files": {"state.json": file_sum(c / "state.json")}})
        ),
        "manifest.json: expected the files of a checkpoint",
    ),
    "sums that are none": (
        lambda c: (c / "manifest.json").write_text('{"files": {"state.json": 3, "learner/rank_0.safetensors": 4}}'),
        "manifest.json: expected the files of a checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_named(checkpoints, name):
    checkpoint = save(checkpoints, 7)
    require_whole(checkpoint, contents=True)
    damage, said = DAMAGES[name]
    damage(checkpoint)
    with pytest.raises(DataError, match=said) as raised:
        require_whole(checkpoint, contents=True)
    assert str(checkpoint) in str(raised.value) and "\n" not in str(raised.value)


def test_one_that_is_set_aside_counts_no_more(checkpoints):
    save(checkpoints, 1)
    damaged = save(checkpoints, 2)
    assert checkpoints.set_aside(damaged).name == "damaged_step_000002"
    save(checkpoints, 3, keep=2)
    assert steps(checkpoints) == [1, 3]
