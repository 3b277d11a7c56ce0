"""Processes that are forked from one that has imported their libraries: the same as those started by themselves."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opsd.cluster import warm
from opsd.cluster.warm import warm_executable, warm_start

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLOUR": "blue"}
SCRIPT = """
import os, sys
said = [os.environ["COLOUR"], os.environ.get("SERVER_ALONE"), os.getcwd(), *sys.argv[1:], "colorsys" in sys.modules]
import beside
print(*said, sys.stdin.readline().strip(), os.getppid())
raise SystemExit("the last words")
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """The node that this test process may share has warm starts of its own, within which there are no others."""
    monkeypatch.setattr(warm._Warm, "path", "")


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Started with these arguments, as Ray starts a worker; libraries that take no time to import."""
    monkeypatch.setattr(warm, "IMPORTS", {"painter": ("colorsys",), "broken": ("no_such_library",)})
    monkeypatch.setenv("SERVER_ALONE", "here")
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "beside.py").touch()  # a user's module: in PYTHONPATH when the worker is asked for
    search_path = f"{tmp_path / 'modules'}{os.pathsep}{warm.actor_search_path()}"

    def run(executable, *arguments):
        return subprocess.run(
            [*shlex.split(executable), str(path), *arguments],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": search_path, "COLOUR": "red"},
            cwd=tmp_path,
            input="asked\n",
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def test_a_forked_process_has_the_imports_and_for_the_rest_is_the_one_that_was_asked_for(script, tmp_path):
    with warm_start(["painter"], ENVIRONMENT):
        executable = warm_executable({"OMP_NUM_THREADS": "1", "OTHER": "x"})
        first, second = script(executable, "one", "two words"), script(executable)
    words = first.stdout.split()
    assert words[:-1] == ["red", "None", str(tmp_path), "one", "two", "words", "True", "asked"]
    assert first.stderr == "the last words\n"
    assert second.stdout.split()[-1] == words[-1]  # one parent


def test_without_a_server_it_is_a_process_of_its_own(script, tmp_path):
    with warm_start(["painter"], ENVIRONMENT):
        executable = warm_executable(ENVIRONMENT)
    found = script(executable, "one")  # its socket is gone: another node of the cluster
    assert found.stdout.split()[:-1] == ["red", "None", str(tmp_path), "one", "False", "asked"]
    assert found.stderr == "the last words\n"
    assert warm_executable(ENVIRONMENT) is None


def test_what_cannot_be_imported_is_left_to_the_process_that_needs_it(script):
    with warm_start(["broken", "a server elsewhere"], ENVIRONMENT):
        executable = warm_executable(ENVIRONMENT)
        answers = [script(executable) for _ in range(3)]
    assert answers[-1].stdout.startswith("red")


def test_another_environment_starts_by_itself():
    """OMP_NUM_THREADS is read when torch is imported: a role with more threads cannot come from this process."""
    with warm_start([], ENVIRONMENT):
        assert warm_executable({"OMP_NUM_THREADS": "1"}) is not None
        assert warm_executable({"OMP_NUM_THREADS": "2"}) is None


def test_a_block_within_another_has_the_others_process():
    with warm_start([], ENVIRONMENT):
        outer = warm_executable(ENVIRONMENT)
        with warm_start([], {"OMP_NUM_THREADS": "2"}):
            assert warm_executable(ENVIRONMENT) == outer
        assert warm_executable(ENVIRONMENT) == outer


def test_the_process_ends_with_the_driver_however_that_ends():
    program = """
import os, signal
from opsd.cluster import warm
with warm.warm_start([], {}):
    print(warm._Warm.path, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    driver = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": warm.actor_search_path()},
        stdout=subprocess.PIPE,
        text=True,
    )
    path = Path(driver.stdout.readline().strip())
    assert driver.wait() == -signal.SIGKILL
    while path.parent.exists():  # a process that stays, and its folder, keep the test from ending
        time.sleep(0.01)
