"""One run writes to a folder at a time, and one that is gone holds up no other."""

import json
import os
import subprocess
import sys

import pytest

from opsd import run_lock
from opsd.errors import ConfigError, StageError
from opsd.run_lock import RunLock, locked


def change(folder, **changes):
    """Another run's lock in place of this process's."""
    path = folder / "run.lock"
    path.write_text(json.dumps({**json.loads(path.read_text()), "token": "other", **changes}))
    return path


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path):
    with locked(tmp_path / "run") as lock:
        with pytest.raises(ConfigError, match=rf"another run writes to it, process {os.getpid()} on .*, last seen 0 s"):
            RunLock(tmp_path / "run").take()
        lock.require()
    assert list((tmp_path / "run").iterdir()) == []
    with locked(tmp_path / "run"):
        pass


def test_the_folder_of_a_killed_run_is_taken_over_at_once_and_it_is_said(tmp_path, capsys):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    RunLock(tmp_path).take()
    change(tmp_path, pid=int(dead.stdout))
    with locked(tmp_path) as lock:
        lock.require()
    said = capsys.readouterr().err
    assert said.startswith(f"lock    process {dead.stdout.strip()} on ")
    assert said.endswith("has ended without releasing it: its folder is taken over\n")


@pytest.mark.parametrize(
    "changes", [{"host": "node-7"}, {"boot": "another container"}, {"boot": None}], ids=["host", "container", "unknown"]
)
def test_a_run_on_another_machine_or_in_another_container_is_gone_when_its_heartbeat_is_old(tmp_path, changes):
    RunLock(tmp_path).take()
    path = change(tmp_path, pid=2**30, **changes)
    with pytest.raises(ConfigError, match="another run writes to it"):
        RunLock(tmp_path).take()
    old = path.stat().st_mtime - run_lock.STALE_S - 5
    os.utime(path, (old, old))
    assert "was last seen 9" in RunLock(tmp_path).take()


def test_a_process_id_that_another_program_has_now_is_not_the_run(tmp_path):
    RunLock(tmp_path).take()
    change(tmp_path, born="17")
    assert "has ended without releasing it" in RunLock(tmp_path).take()


def test_a_run_that_lost_its_folder_notices_and_leaves_the_other_ones_lock(tmp_path):
    with locked(tmp_path) as lock:
        path = change(tmp_path)
        lock.beat()
        with pytest.raises(StageError, match=r"is no longer this run's: process \d+ on .* has taken it over"):
            lock.require()
    assert json.loads(path.read_text())["token"] == "other"


def test_the_heartbeat_keeps_a_run_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
    with locked(tmp_path) as lock:
        os.utime(lock.path, (0, 0))
        for _ in range(1000):
            if lock.path.stat().st_mtime > 0:
                break
            subprocess.run(["sleep", "0.01"], check=True)
        assert lock.path.stat().st_mtime > 0


def test_a_lock_that_another_run_made_meanwhile_goes_back(tmp_path):
    """Two runs find the same stale lock; the second to act finds the first one's in its place."""
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    second._put_away({"token": "the stale one"})
    assert first.holds() and [each.name for each in tmp_path.iterdir()] == ["run.lock"]
