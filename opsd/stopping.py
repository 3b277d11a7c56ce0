"""Ctrl-C and SIGTERM: a run ends after its step, with a checkpoint; told twice, or outside of a step, at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from opsd.run_folder import RunFolder

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STDERR = 2


class StopRequest:
    """Whether the run was told to end while a step was under way: what a step changes is whole only at its end."""

    def __init__(self) -> None:
        self.in_step = False
        self.requested = False

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        """The signals' handler. Raises KeyboardInterrupt where there is no step to wait for, and the second time."""
        if self.requested or not self.in_step:
            raise KeyboardInterrupt
        self.requested = True
        below_the_bar = b"\n" if os.isatty(STDERR) else b""
        # Not print: the signal may have come in the middle of one.
        os.write(STDERR, below_the_bar + b"stopping after this step; Ctrl-C again to end at once\n")


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Handles both signals until it is left. A signal that is ignored, as in a shell's background job, stays so."""
    stop, earlier = StopRequest(), {}
    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        earlier = {number: signal.getsignal(number) for number in SIGNALS}
        earlier = {number: handler for number, handler in earlier.items() if handler not in (signal.SIG_IGN, None)}
    for number in earlier:
        signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def says_what_is_left(output_dir: str) -> Iterator[None]:
    """A run that is stopped inside says what its folder holds to continue from."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt(f"{str(stopped) or 'stopped'}: {what_is_left(RunFolder(output_dir))}") from None


def what_is_left(folder: RunFolder) -> str:
    step = folder.newest_step()
    if step is None:
        return f"there is no checkpoint in {folder.path}, so resume=auto starts again at step 0"
    return f"{folder.path} has a checkpoint after step {step}, from which resume=auto continues"
