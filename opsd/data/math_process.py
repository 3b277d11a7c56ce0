"""Mathematics is read and compared in another process, so that no answer can hold up a run: see math_worker.py."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, NamedTuple

from opsd.data import math_worker
from opsd.errors import StageError


class Judgement(NamedTuple):
    """What there is to say of one answer."""

    right: bool
    value: str | None  # equal values give equal text; None: the answer has none
    gave_up: bool  # it took more than math_worker.LIMIT_S or LIMIT_BYTES: wrong, without a value


class MathProcess:
    """One worker, started at the first need and again where it was killed. `start` returns before it is ready."""

    def __init__(self, limit_s: float = math_worker.LIMIT_S) -> None:
        self.limit_s = limit_s  # processor seconds for one answer
        self._lock = threading.Lock()
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
            answers = self._asked(jobs) or self._asked(jobs)  # a worker that was killed from outside starts again
        if answers is None:
            raise StageError("the process that grades mathematics ended twice on the same answers")
        return [Judgement(*answer) for answer in answers]

    def stop(self) -> None:
        """Ends the worker; the next need starts another."""
        with self._lock:
            if self._owner == os.getpid():
                self._end()

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


def _pipes(worker: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    """What it reads from, and what it writes to."""
    assert worker.stdin is not None and worker.stdout is not None, "a worker is started with both"
    return worker.stdin, worker.stdout


MATH = MathProcess()
atexit.register(MATH.stop)
