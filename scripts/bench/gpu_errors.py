"""What a check of gpu_check.py returns: an error, and how large it may be.

The allowed error is that of plain PyTorch in the same dtype, doubled, plus a little.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLACK = {"float32": 1e-5, "bfloat16": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Check:
    what: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for nan


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


def largest_difference(found: Tensor, exact: Tensor) -> float:
    """Of finite entries; nan where one is infinite and the other is not."""
    both = found.isneginf() & exact.isneginf()
    return (found.double() - exact.double()).masked_fill(both, 0.0).abs().max().item()
