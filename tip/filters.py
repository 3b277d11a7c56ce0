"""Which tokens may be selected at all: whole rollouts or ends of rollouts are set aside before a score counts.

    FILTERS[name](batch, **options) -> bool [T], True: may be selected

`filters={horizon: {start: 64, end: 512}}` turns one on; several must all agree.
"""
# T response tokens of the global batch, R rollouts

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opsd.types import BatchStats
from tip.per_rollout import mean_per_rollout
from tip.scores import known


def fire(batch: BatchStats, *, drop: float = 0.2) -> Tensor:
    """Without the floor(drop * R) rollouts whose tokens the teacher finds least likely in the mean (FiRe)."""
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    mean_R = mean_per_rollout(batch, known(batch.tokens, "teacher_logprob_T"))
    stays_R = torch.ones(len(mean_R), dtype=torch.bool)
    stays_R[mean_R.argsort(stable=True)[: int(drop * len(mean_R))]] = False
    return stays_R[batch.rollout_T]


def horizon(batch: BatchStats, *, start: int, end: int) -> Tensor:
    """Only the first H response tokens of each rollout, H going evenly from `start` to `end` over the run."""
    if not 1 <= start <= end:
        raise ValueError(f"need 1 <= start <= end, got {start} and {end}")
    return batch.position_T < round(start + (end - start) * batch.progress)


FILTERS: dict[str, Callable[..., Tensor]] = {"fire": fire, "horizon": horizon}
