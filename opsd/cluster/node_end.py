"""What Ray leaves of a node when the driver that started it is killed: two of its agents try for a minute to reach a
server that has ended with the driver. A process of our own, which outlives the driver, ends them sooner.

This file is also that process's program, and imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "OPSD_NODE"  # in the environment of a node's processes; their command lines become titles
GRACE_S = 5.0  # in which Ray's processes end by themselves


@contextmanager
def marked() -> Iterator[str]:
    """Processes that are started within the block have the mark that it yields, which no others have."""
    mark = os.environ[MARK] = uuid.uuid4().hex
    try:
        yield mark
    finally:
        os.environ.pop(MARK, None)


@contextmanager
def ended_with_driver(mark: str, grace_s: float = GRACE_S) -> Iterator[None]:
    """If this process ends within the block, so does, `grace_s` later, every process of this user that has the mark."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, mark, str(grace_s)],
        stdin=subprocess.PIPE,  # its end is this process's
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is the driver's
    )
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def end_all(mark: str) -> None:
    wanted = f"{MARK}={mark}".encode()
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (each / "environ").read_bytes().split(b"\0"):
                os.kill(int(each.name), signal.SIGKILL)
        except OSError:  # it has ended meanwhile, or is another user's
            continue


if __name__ == "__main__":
    sys.stdin.buffer.read()
    time.sleep(float(sys.argv[2]))
    end_all(sys.argv[1])
