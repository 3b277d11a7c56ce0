"""The clock, the peak of memory and the table of the benchmarks that time parts of the learner."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path
from types import TracebackType

import torch

PAGE = 4096
M_MMAP_THRESHOLD = -3  # of mallopt(3)
SECONDS_BETWEEN_LOOKS = 5e-4


def clock(device: str) -> float:
    """Seconds: of the process's CPU time on one CPU thread, which other processes disturb least, else of the wall."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


class PeakMemory:
    """A context; afterwards `bytes` is the most memory that was allocated within it, above what was when it began.

    On the CPU a thread looks at the size of the process's writable memory (Linux). Not at its resident part: the kernel
    takes pages from that, and gives no back, while a measurement runs. A peak of less than a millisecond can be missed.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            # What was freed before but stayed the process's would hide what is allocated now.
            ctypes.CDLL(None).malloc_trim(0)
            self._began, self._ended = threading.Event(), threading.Event()
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
            self._began.wait()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device == "cuda":
            self._peak = torch.cuda.max_memory_allocated()
        else:
            self._ended.set()
            self._thread.join()
        self.bytes = max(0, self._peak - self._before)

    def _look(self) -> None:
        self._before = self._peak = _writable_bytes()  # with this thread's own stack
        self._began.set()
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            self._peak = max(self._peak, _writable_bytes())


def give_freed_memory_back() -> None:
    """From now on the C library keeps no freed tensor for reuse, which would hide what is allocated next. Slower."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 16 * PAGE)


def _writable_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[5]) * PAGE


def markdown(table: list[list[str]]) -> str:
    header, *body = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([header, "|" + "---|" * len(table[0]), *body])
