"""From tokens to rollouts."""
# T response tokens of the global batch, R rollouts

from __future__ import annotations

import torch
from torch import Tensor

from opsd.errors import ConfigError
from opsd.types import BatchStats


def mean_per_rollout(batch: BatchStats, values_T: Tensor) -> Tensor:
    """The mean of each rollout's tokens, float64 [R]."""
    sum_R = torch.zeros(len(batch.lengths), dtype=torch.float64).index_add(0, batch.rollout_T, values_T.double())
    return sum_R / torch.tensor(batch.lengths)


def rewards(batch: BatchStats, wanted_by: str) -> Tensor:
    """float32 [R]. Raises ConfigError in a run without a grader."""
    if batch.reward_R is None:
        raise ConfigError(f"{wanted_by} needs rewards: set data.grader")
    return batch.reward_R


def known_of_rollouts(batch: BatchStats, field: str) -> Tensor:
    """An optional statistic of the rollouts, [R]. Raises ValueError where it is None."""
    value_R = getattr(batch, field)
    if value_R is None:
        raise ValueError(f"this needs BatchStats.{field}, got None: a run fills it, a batch of your own must bring it")
    return value_R
