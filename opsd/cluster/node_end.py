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
def ended_with_driver(session_dir: str, grace_s: float = GRACE_S) -> Iterator[None]:
    """If this process ends within the block, so do, `grace_s` later, the others that write logs into `session_dir`."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, os.path.realpath(session_dir), str(grace_s)],
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


def writers(folder: str) -> Iterator[int]:
    """This user's processes that have a file below `folder` open for writing; its name has no links.

    By their files, as nothing else names them: Ray writes a title over their command lines and, at random, over a
    sixth of their environments.
    """
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(_writes_below(folder, process, number) for number in os.listdir(process / "fd")):
                yield int(process.name)
        except OSError:  # it has ended meanwhile, or is another user's
            continue


def _writes_below(folder: str, process: Path, number: str) -> bool:
    try:
        if not os.readlink(process / "fd" / number).startswith(f"{folder}/"):
            return False
        described = (process / "fdinfo" / number).read_text().split()
    except OSError:  # it is closed by now
        return False
    return int(described[described.index("flags:") + 1], 8) & os.O_ACCMODE != os.O_RDONLY


def end_all(session_dir: str) -> None:
    for process in writers(session_dir):
        try:
            os.kill(process, signal.SIGKILL)
        except OSError:
            continue


if __name__ == "__main__":
    sys.stdin.buffer.read()
    time.sleep(float(sys.argv[2]))
    end_all(sys.argv[1])
