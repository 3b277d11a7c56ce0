"""What a killed driver leaves behind is ended, and nothing else."""

import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

SLEEPER = [sys.executable, "-c", "import time; time.sleep(120)"]
# A driver that says when it is watched.
PROGRAM = """
import sys, time
from opsd.cluster.node_end import ended_with_driver
with ended_with_driver(sys.argv[1], grace_s=0.0):
    print("watched", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def started():
    processes = []

    def start(*command, **options):
        processes.append(subprocess.Popen([*command], **options))
        return processes[-1]

    yield start
    for each in processes:
        each.kill()
        each.communicate()


def test_a_killed_drivers_session_ends_and_another_goes_on(started):
    own, other = f"session_{uuid.uuid4().hex}", f"session_{uuid.uuid4().hex}"
    agent, stranger = started(*SLEEPER, own), started(*SLEEPER, other)
    driver = started(sys.executable, "-c", PROGRAM, own, stdout=subprocess.PIPE)
    assert driver.stdout.readline() == b"watched\n"
    assert agent.poll() is None
    driver.send_signal(signal.SIGKILL)
    assert agent.wait(timeout=60) == -signal.SIGKILL
    assert stranger.poll() is None


def test_a_driver_that_ends_leaves_no_watcher(started):
    program = PROGRAM.replace("time.sleep(120)", "pass").replace("grace_s=0.0", "grace_s=60.0")
    own = f"session_{uuid.uuid4().hex}"
    agent = started(*SLEEPER, own)
    assert subprocess.run([sys.executable, "-c", program, own], timeout=60).returncode == 0
    time.sleep(0.5)
    assert agent.poll() is None  # Ray ends its own
    assert _command_lines_with(own) == 1


def _command_lines_with(word):
    count = 0
    for each in Path("/proc").glob("[0-9]*"):
        try:
            count += word.encode() in (each / "cmdline").read_bytes()
        except OSError:
            continue
    return count
