"""The process that reads and compares mathematics: a program of its own, started by opsd.data.math_process.

It may lose a fork, not itself: each batch of answers is judged in one, which the kernel ends where an answer takes more
processor time than its limit, also in the middle of a C loop that no signal handler could leave. The next fork
continues behind that answer. So nothing but the answer itself decides how it is judged, however busy the machine is.

It imports nothing of ours, as it must start fast; it ends when its standard input closes, with whoever started it.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import resource
import select
import signal
import struct
import sys
from contextlib import suppress
from functools import lru_cache
from typing import IO, Any, BinaryIO, Protocol

LIMIT_S = 3.0  # processor seconds for one answer; what people write takes some hundredths
LIMIT_BYTES = 4 * 2**30  # memory of a fork: 10^{10^{10}} is an integer of 4 GiB
WAIT_S = 60.0  # wall clock for one answer, where a machine does not keep the limit above
PR_SET_PDEATHSIG = 1  # of linux/prctl.h: a fork ends with its worker

Job = tuple[str | None, str]  # reference answer (None: nothing to compare with), the response's text
Judgement = tuple[bool, str | None, bool]  # right; the value as text, None: none found; gave up


class Source(Protocol):
    """What messages are read from; select takes it."""

    def read(self, size: int, /) -> bytes: ...

    def fileno(self) -> int: ...


def serve(requests: Source, answers: IO[bytes], limit_s: float) -> None:
    """Judges batch after batch until `requests` ends."""
    while (message := read_message(requests)) is not None:
        write_message(answers, judge_all([tuple(job) for job in message], requests, limit_s))


def judge_all(jobs: list[Job], requests: Source, limit_s: float) -> list[Judgement]:
    """What each job came to, in order. One that its fork does not survive is given up: wrong, without a value."""
    judged: list[Judgement] = []
    while len(judged) < len(jobs):
        judged += _judge_in_fork(jobs[len(judged) :], requests, limit_s)
        if len(judged) < len(jobs):
            judged.append((False, None, True))
    return judged


def _judge_in_fork(jobs: list[Job], requests: Source, limit_s: float) -> list[Judgement]:
    """What the first jobs came to, as many as one fork finishes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):  # whatever it is, the missing line says it
            os.close(reading)
            _judge_each(jobs, writing, limit_s)
        os._exit(0)
    os.close(writing)
    received = bytearray()
    sources: list[int | Source] = [reading, requests]
    try:
        while True:
            ready, _, _ = select.select(sources, [], [], WAIT_S)
            if requests in ready:  # nothing is asked before this is answered: it has been closed
                sys.exit(0)
            part = os.read(reading, 1 << 16) if ready else b""
            if not part:
                break
            received += part
    finally:
        os.close(reading)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    lines = received.split(b"\n")[:-1]  # behind the last newline stands what was cut off
    return [tuple(json.loads(line)) for line in lines]


def _judge_each(jobs: list[Job], writing: int, limit_s: float) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for job in jobs:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        line = json.dumps(judge(*job)).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        while line:
            line = line[os.write(writing, line) :]


def judge(reference: str | None, response: str) -> Judgement:
    """What math-verify makes of one answer; its own time limit is off, as an alarm cannot end every loop."""
    from math_verify import verify

    try:
        parsed = _parse(response)
        right = reference is not None and verify(_parse(reference), parsed, timeout_seconds=None)
    except MemoryError:
        return False, None, True
    return bool(right), _as_text(parsed), False


@lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """An expression and its text, or nothing. Kept, as many answers of a batch have one reference."""
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def _as_text(parsed: list[Any]) -> str | None:
    for form in parsed:
        with suppress(ValueError, RecursionError):  # an integer of more digits than Python prints
            return str(form)
    return None


def read_message(source: Source) -> Any:
    """None where the source has ended."""
    head = source.read(8)
    if len(head) < 8:
        return None
    [size] = struct.unpack(">Q", head)
    body = source.read(size)
    return json.loads(body) if len(body) == size else None


def write_message(target: IO[bytes], message: Any) -> None:
    body = json.dumps(message).encode()
    target.write(struct.pack(">Q", len(body)) + body)
    target.flush()


class _Whole:
    """Reads in full from an unbuffered file, so that select sees everything that has not been read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._file.read(size - len(parts))
            if not part:
                break
            parts += part
        return bytes(parts)


def read_percentages() -> None:
    """latex2sympy2_extended 1.11 asks its parser for a token that it does not have before it gets to "50\\%"."""
    from latex2sympy2_extended.antlr_parser import PSParser

    if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
        PSParser.AtomContext.FUNC_GAMMA = lambda context: None


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us, whose end is ours
    requests, answers = open(0, "rb", buffering=0), os.fdopen(os.dup(1), "wb")  # noqa: SIM115
    os.dup2(2, 1)  # what a library prints is no answer
    logging.disable(logging.CRITICAL)  # math-verify names neither the answer nor itself
    read_percentages()
    judge("1", r"\boxed{\frac{1}{2}} or $2$, 3")  # half of the imports and every pattern come with the first answer
    serve(_Whole(requests), answers, float(sys.argv[1]))


if __name__ == "__main__":
    main()
