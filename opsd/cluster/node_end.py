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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GRACE_S = 5.0  # in which Ray's processes end by themselves


@contextmanager
def ended_with_driver(session: str, grace_s: float = GRACE_S) -> Iterator[None]:
    """If this process ends within the block, so does, `grace_s` later, every process of this user that has `session` in
    its command line: the name of a Ray session that this process has started, which is no other's.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, session, str(grace_s)],
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


def end_all(session: str) -> None:
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if int(each.name) != os.getpid() and session.encode() in (each / "cmdline").read_bytes():
                os.kill(int(each.name), signal.SIGKILL)
        except OSError:  # it has ended meanwhile, or is another user's
            continue


if __name__ == "__main__":
    sys.stdin.buffer.read()
    time.sleep(float(sys.argv[2]))
    end_all(sys.argv[1])
