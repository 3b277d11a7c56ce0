"""The clock, the peak of memory and the table of the benchmarks that time parts of the learner."""

from __future__ import annotations

import time
from pathlib import Path

import torch


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def restart_peak(device: str) -> int:
    """Starts a new peak and returns the bytes in use."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is from now on
    return read_peak(device)


def read_peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def markdown(table: list[list[str]]) -> str:
    header, *body = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([header, "|" + "---|" * len(table[0]), *body])
