"""A disk that is full for a while, or to the end, or read-only: the run lives, says it once, and damages nothing."""

import os
import subprocess

import pytest

from opsd.checkpoints import Checkpoints, require_whole, step_of
from tests.faults.test_kills import run
from tests.integration.conftest import pair  # noqa: F401  (a fixture)
from tests.integration.runs import losses

pytestmark = pytest.mark.long
HOOKS = ("hooks=tests.faults.filling:build_hooks", "checkpoint.keep=9")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB: a checkpoint of the tiny pair takes under one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system takes the right to mount one")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def whole_steps(folder):
    checkpoints = Checkpoints(folder / "checkpoints")
    for checkpoint in checkpoints.finished():
        require_whole(checkpoint, contents=True)
    assert not list(checkpoints.path.glob("unfinished_*"))
    return [step_of(each) for each in checkpoints.finished()]


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint(pair, small_disk):  # noqa: F811
    process = run(pair, small_disk / "run", *HOOKS, "+hook_options.to_the_end=false")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "warning step_000004 was not saved: " in process.stderr
    assert "has a checkpoint after step 2, from which resume=auto continues" in process.stderr
    assert "Traceback" not in process.stderr
    assert whole_steps(small_disk / "run") == [2, 6]
    assert (small_disk / "run" / "student" / "model.safetensors").exists()
    assert len(losses(small_disk / "run")) >= 4  # the lines of two steps may be lost


def test_a_disk_that_stays_full_ends_in_an_error_with_the_first_checkpoint_whole(pair, small_disk):  # noqa: F811
    process = run(pair, small_disk / "run", *HOOKS, "+hook_options.to_the_end=true")
    assert process.returncode == 2 and "Traceback" not in process.stderr, process.stderr[-3000:]
    assert "No space left on device" in process.stderr.splitlines()[-1]
    assert whole_steps(small_disk / "run") == [2]
    (small_disk / "filler").unlink()
    again = run(pair, small_disk / "run", "hooks=tip.plugin:build_hooks", "resume=auto", "checkpoint.keep=9")
    assert again.returncode == 2 and "hooks differs" in again.stderr
    other = ("+hook_options.to_the_end=false", "resume=auto", "resume_changed=true")
    again = run(pair, small_disk / "run", *HOOKS, *other)
    assert again.returncode == 0, again.stderr[-3000:]


def test_a_folder_that_may_not_be_written_is_refused_before_a_model_is_loaded(pair, small_disk):  # noqa: F811
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    process = run(pair, small_disk / "run", "hooks=tip.plugin:build_hooks")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    [line] = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "Read-only file system" in line
    assert not os.listdir(small_disk)
