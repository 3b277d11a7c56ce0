"""The four kinds of token that token importance tells apart, for reports and for per-quadrant metrics."""
# T tokens

from __future__ import annotations

import torch
from torch import Tensor


def quadrants(entropy_T: Tensor, divergence_T: Tensor, *, quantile: float = 0.5) -> Tensor:
    """The quadrant of each token, int64 [T] in 1..4; both axes in any unit, only their order counts.

    Q1 high entropy, high divergence; Q2 high, low; Q3 low, high (overconfident); Q4 low, low (solved). A value is high
    where it is strictly above the value at `quantile` of its axis, itself one of the tokens' values. Equal values
    therefore never part: an axis whose tokens all tie, or whose largest value reaches down to the quantile, is low
    throughout. Raises ValueError where the shapes differ or `quantile` leaves [0, 1].
    Source: docs/selection.md, Quadrants.
    """
    if entropy_T.ndim != 1 or entropy_T.shape != divergence_T.shape:
        shapes = f"{tuple(entropy_T.shape)} and {tuple(divergence_T.shape)}"
        raise ValueError(f"entropy_T and divergence_T must both be [T], got {shapes}")
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"quantile must be in [0, 1], got {quantile}")
    if len(entropy_T) == 0:
        return torch.empty(0, dtype=torch.int64, device=entropy_T.device)
    low_entropy_T = ~_is_high(entropy_T, quantile)
    low_divergence_T = ~_is_high(divergence_T, quantile)
    return 1 + 2 * low_entropy_T.long() + low_divergence_T.long()


def _is_high(values_T: Tensor, quantile: float) -> Tensor:
    # Not torch.quantile: it refuses the millions of tokens of a large step.
    rank = 1 + int(quantile * (len(values_T) - 1))
    return values_T > values_T.kthvalue(rank).values
