"""No answer holds up the graders, and none has a say in another's judgement."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from opsd.data.math_process import Judgement, MathProcess, MathProcesses
from opsd.errors import StageError

pytestmark = pytest.mark.slow  # its tests take more than ten seconds together: real servers and processes

GAVE_UP = Judgement(right=False, value=None, gave_up=True)


@pytest.fixture(scope="module")
def process():
    process = MathProcess(limit_s=0.5)
    yield process
    process.stop()


@pytest.mark.parametrize(
    "endless",
    [
        r"$9^{9^{9^9}}$",
        r"so $\boxed{(10^{9})!}$",
        r"$\binom{10^{9}}{10^{8}}$",
        "$" + "1+" * 20_000 + "1$",
    ],
    ids=["tower", "factorial", "combinations", "long"],
)
def test_an_endless_answer_is_given_up_and_its_neighbours_are_judged(process, endless):
    judged = process.judge(
        [("\\boxed{1}", r"\boxed{2}"), ("\\boxed{1}", endless), ("\\boxed{1/2}", r"it is \boxed{0.5}")]
    )
    assert judged == [Judgement(False, "2", False), GAVE_UP, Judgement(True, "1/2", False)]


@pytest.mark.parametrize(
    "odd", ["(" * 20_000 + "1" + ")" * 20_000, r"\boxed{" * 500, "1" * 100_000, r"$10^{10^{10}}$", r"$2^{20000}$", ""]
)
def test_an_odd_answer_is_wrong(process, odd):
    [judged, right] = process.judge([("\\boxed{7}", odd), ("\\boxed{7}", "7")])
    assert not judged.right and right.right


def test_what_the_libraries_say_of_an_answer_is_not_on_the_terminal(capfd):
    """math-verify's "Timeout during comparison" names neither the answer nor itself."""
    process = MathProcess(limit_s=0.5)
    try:
        process.judge([("\\boxed{1}", r"$9^{9^{9^9}}$"), ("\\boxed{1}", r"$(10^{9})!$"), ("\\boxed{1}", r"\boxed{x+}")])
    finally:
        process.stop()
    assert capfd.readouterr() == ("", "")


def test_a_worker_that_is_killed_starts_again(process):
    process.start()
    os.kill(process._worker.pid, signal.SIGKILL)
    assert process.judge([("\\boxed{7}", "7")])[0].right


def test_several_workers_judge_as_one(monkeypatch):
    """Each what it got, in the order asked; one that is stopped at work ends whoever waits for it."""
    monkeypatch.setattr("opsd.data.math_process.JOBS_EACH", 2)
    workers = MathProcesses(3)
    workers.start()
    jobs = [("\\boxed{7}", str(value)) for value in (7, 3, 7, 7, 1, 7, 2)]
    assert [judged.value for judged in workers.judge(jobs)] == ["7", "3", "7", "7", "1", "7", "2"]
    assert [worker._worker is not None for worker in workers.workers] == [True] * 3
    workers.stop()
    assert [worker._worker for worker in workers.workers] == [None] * 3
    assert workers.judge(jobs[:1])[0].right
    workers.stop()


def test_a_stop_reaches_a_worker_that_is_at_work_for_another_thread():
    process, failed = MathProcess(limit_s=1000.0), []

    def judge():
        try:
            process.judge([("\\boxed{1}", r"$9^{9^{9^9}}$")])
        except StageError as error:
            failed.append(str(error))

    thread = threading.Thread(target=judge)
    thread.start()
    while process._worker is None:
        time.sleep(0.01)
    process.stop()
    thread.join(60)
    assert failed == ["the process that grades mathematics ended twice on the same answers, or was stopped"]
    assert process._worker is None and process.judge([("\\boxed{7}", "7")])[0].right
    process.stop()


def test_it_imports_neither_torch_nor_our_packages(process):
    """It starts beside a run that is starting, and must not be slower than it."""
    process.judge([(None, "1")])
    loaded = Path(f"/proc/{process._worker.pid}/maps").read_text()
    assert "libtorch" not in loaded and "pyarrow" not in loaded


def test_worker_and_fork_end_with_a_parent_that_is_killed():
    program = (
        "from opsd.data.math_process import MathProcess; process = MathProcess(limit_s=1000.0)\n"
        "process.judge([(None, '1')]); print(process._worker.pid, flush=True)\n"
        "process.judge([(None, '$9^{9^{9^9}}$')])"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        worker = int(parent.stdout.readline())
        children = Path(f"/proc/{worker}/task/{worker}/children")
        while not (forks := children.read_text().split()):
            time.sleep(0.01)
        endings = [os.pidfd_open(pid) for pid in (worker, int(forks[0]))]
        parent.kill()
    assert all(select.select([ending], [], [], 60)[0] for ending in endings)
    for ending in endings:
        os.close(ending)


def test_who_asks_it_imports_no_mathematics():
    """sympy and math-verify take seconds of a driver that is starting."""
    code = (
        "import sys; from opsd.data.grading import judge_all\n"
        "assert judge_all(['math'], ['$1/2$'], ['0.5'])[0].right\n"
        "print([name for name in ('sympy', 'math_verify', 'latex2sympy2_extended', 'torch') if name in sys.modules])"
    )
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert asked.stdout == "[]\n"
