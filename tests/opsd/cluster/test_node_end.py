"""What a killed driver leaves of its node is ended, and nothing else."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opsd.cluster.node_end import writers

# It opens a log, as each of Ray's processes does.
WRITER = """
import sys, time
log = open(sys.argv[1], sys.argv[2])
print("open", flush=True)
time.sleep(120)
"""
# A driver that says when it is watched.
DRIVER = """
import sys, time
from opsd.cluster.node_end import ended_with_driver
with ended_with_driver(sys.argv[1], grace_s=0.0):
    print("watched", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def started():
    processes = []

    def start(program, *arguments):
        process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() in (b"open\n", b"watched\n")
        return process

    yield start
    for each in processes:
        each.kill()
        each.communicate()


@pytest.fixture
def session_dir(tmp_path):
    folder = tmp_path / "session"
    folder.mkdir()
    (folder / "raylet.out").write_text("")
    return folder


def test_a_killed_drivers_node_ends_and_nothing_else(started, session_dir, tmp_path):
    agent = started(WRITER, session_dir / "agent.out", "w")
    reader = started(WRITER, session_dir / "raylet.out", "r")  # a user who looks at the log
    neighbour = started(WRITER, tmp_path / "session.out", "w")  # the folder's name and more
    driver = started(DRIVER, session_dir)
    assert agent.poll() is None
    driver.send_signal(signal.SIGKILL)
    assert agent.wait(timeout=60) == -signal.SIGKILL
    assert reader.poll() is None and neighbour.poll() is None


def test_a_folder_with_another_name_is_the_same(started, session_dir, tmp_path):
    (tmp_path / "latest").symlink_to(session_dir)
    agent = started(WRITER, session_dir / "agent.out", "a")
    started(DRIVER, tmp_path / "latest").send_signal(signal.SIGKILL)
    assert agent.wait(timeout=60) == -signal.SIGKILL


def test_a_driver_that_ends_leaves_no_watcher_and_ends_nothing(started, session_dir):
    program = DRIVER.replace("time.sleep(120)", "pass").replace("grace_s=0.0", "grace_s=60.0")
    agent = started(WRITER, session_dir / "agent.out", "w")
    assert subprocess.run([sys.executable, "-c", program, session_dir], timeout=60).returncode == 0
    assert str(session_dir) not in "".join(watchers())
    assert agent.poll() is None


@pytest.mark.parametrize("mode", ["w", "a", "r+"])
def test_who_writes_is_found(started, session_dir, mode):
    agent = started(WRITER, session_dir / "raylet.out", mode)
    assert list(writers(os.path.realpath(session_dir))) == [agent.pid]


def watchers():
    for each in Path("/proc").glob("[0-9]*"):
        try:
            command = (each / "cmdline").read_text()
        except OSError:
            continue
        if "node_end" in command:
            yield command
