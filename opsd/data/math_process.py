"""Mathematics is read and compared in other processes, so that no answer can hold up a run: see math_worker.py."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import IO, NamedTuple

from opsd.data import math_worker
from opsd.errors import StageError

JOBS_EACH = 32  # answers that are worth a worker of their own: it takes a second to start


class Judgement(NamedTuple):
    """What there is to say of one answer."""

    right: bool
    value: str | None  # equal values give equal text; None: the answer has none
    gave_up: bool  # it took more than math_worker.LIMIT_S or LIMIT_BYTES: wrong, without a value
    score: float | None = None  # [0, 1], what it is worth where right and wrong are not all; None: they are
    parts: Mapping[str, float] | None = None  # what the score is made of, by name, for an evaluation to print

    @property
    def reward(self) -> float:
        """The score, or 1 for right and 0 for wrong."""
        return float(self.right) if self.score is None else self.score


class MathProcess:
    """One worker, started at the first need and again where it was killed. `start` returns before it is ready."""

    def __init__(self, limit_s: float = math_worker.LIMIT_S) -> None:
        self.limit_s = limit_s  # processor seconds for one answer
        self._lock = threading.Lock()
        self._stopping = False
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def start(self) -> None:
        with self._lock:
            self._running()

    def judge(self, jobs: Sequence[tuple[str | None, str]]) -> list[Judgement]:
        """One judgement for each (reference, response), independent of the others. Raises StageError.

        Both are texts in which math-verify looks for an expression; reference None: there is nothing to compare with.
        """
        if not jobs:
            return []
        with self._lock:
            answers = self._asked(jobs)
            if answers is None and not self._stopping:  # a worker that was killed from outside starts again
                answers = self._asked(jobs)
        if answers is None:
            raise StageError("the process that grades mathematics ended twice on the same answers, or was stopped")
        return [Judgement(*answer) for answer in answers]

    def stop(self) -> None:
        """Ends the worker, also one that is at work for another thread; the next need starts another."""
        if self._owner != os.getpid():
            return
        self._stopping, worker = True, self._worker
        if worker is not None:
            worker.kill()
        with self._lock:
            self._end()
            self._stopping = False

    def _asked(self, jobs: Sequence[tuple[str | None, str]]) -> list | None:
        """None where the worker ended instead."""
        requests, responses = _pipes(self._running())
        try:
            math_worker.write_message(requests, jobs)
            answers = math_worker.read_message(responses)
        except BrokenPipeError:
            answers = None
        except BaseException:  # Ctrl-C: what it still answers is not for the next question
            self._end()
            raise
        if answers is None:
            self._end()
        return answers

    def _end(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        requests, responses = _pipes(worker)
        responses.close()
        with suppress(BrokenPipeError):
            requests.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # a fork must not talk through its parent's pipes
            self._worker, self._owner = None, os.getpid()
        if self._worker is None or self._worker.poll() is not None:
            # -P: the folder of that file is not for imports. A group of its own: Ctrl-C is not for it.
            command = [sys.executable, "-P", math_worker.__file__, str(self.limit_s)]
            paths = os.pathsep.join(path for path in sys.path if path)
            self._worker = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,
            )
        return self._worker


class MathProcesses:
    """Workers that share what there is to judge; a second one starts where there is enough for two."""

    def __init__(self, number: int) -> None:
        self.workers = [MathProcess() for _ in range(number)]

    def start(self) -> None:
        """Starts what the first few answers need; does not wait for it."""
        self.workers[0].start()

    def judge(self, jobs: Sequence[tuple[str | None, str]]) -> list[Judgement]:
        """As MathProcess.judge, whoever does what."""
        number = min(len(self.workers), 1 + len(jobs) // JOBS_EACH)
        if number == 1:  # in this thread, which Ctrl-C reaches
            return self.workers[0].judge(jobs)
        judged: list[Judgement] = [Judgement(False, None, False)] * len(jobs)

        def share(worker: int) -> None:
            # Every so many: a hard problem's answers stand together.
            judged[worker::number] = self.workers[worker].judge(jobs[worker::number])

        with ThreadPoolExecutor(number, "grading") as executor:
            try:
                list(executor.map(share, range(number)))
            except BaseException:  # the others' answers are for nobody
                self.stop()
                raise
        return judged

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()


def _pipes(worker: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """What it reads from, and what it writes to."""
    assert worker.stdin is not None and worker.stdout is not None, "a worker is started with both"
    return worker.stdin, worker.stdout


# A driver's machine may have a hundred cores; the engines' host threads, where they share it, need theirs.
MATH = MathProcesses(max(1, min(8, len(os.sched_getaffinity(0)) // 2)))
atexit.register(MATH.stop)
