"""What a killed driver leaves of its node is ended, and nothing else."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from opsd.cluster.node_end import MARK, marked

SLEEPER = [sys.executable, "-c", "import time; time.sleep(120)"]
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

    def start(*command, mark=None, **options):
        environment = {**os.environ, **({MARK: mark} if mark else {})}
        processes.append(subprocess.Popen([*command], env=environment, **options))
        return processes[-1]

    yield start
    for each in processes:
        each.kill()
        each.communicate()


def test_a_killed_drivers_node_ends_and_another_goes_on(started):
    own, other = uuid.uuid4().hex, uuid.uuid4().hex
    agent, stranger = started(*SLEEPER, mark=own), started(*SLEEPER, own, mark=other)
    driver = started(sys.executable, "-c", DRIVER, own, stdout=subprocess.PIPE)
    assert driver.stdout.readline() == b"watched\n"
    assert agent.poll() is None
    driver.send_signal(signal.SIGKILL)
    assert agent.wait(timeout=60) == -signal.SIGKILL
    assert stranger.poll() is None


def test_a_driver_that_ends_leaves_no_watcher_and_ends_nothing(started):
    program = DRIVER.replace("time.sleep(120)", "pass").replace("grace_s=0.0", "grace_s=60.0")
    own = uuid.uuid4().hex
    agent = started(*SLEEPER, mark=own)
    assert subprocess.run([sys.executable, "-c", program, own], timeout=60).returncode == 0
    assert own not in "".join(command_lines())
    assert agent.poll() is None


def test_only_what_is_started_within_has_the_mark():
    show = [sys.executable, "-c", f"import os; print(os.environ.get({MARK!r}, ''))"]
    with marked() as mark:
        inside = subprocess.run(show, capture_output=True, text=True).stdout.strip()
    assert inside == mark
    assert subprocess.run(show, capture_output=True, text=True).stdout.strip() == ""


def command_lines():
    for each in Path("/proc").glob("[0-9]*"):
        try:
            yield (each / "cmdline").read_text()
        except OSError:
            continue
