"""A batch's values on one axis, brought to [0, 1]: by their extremes, by their quantiles, or by their order."""
# T response tokens of the global batch

from __future__ import annotations

import torch
from torch import Tensor


def scale_axis(values_T: Tensor, scaling: str, *, clip_quantile: float = 1.0) -> Tensor:
    """`values_T` brought to [0, 1] over the whole batch, float32 or wider; 0 everywhere where the axis is constant.

    "minmax": lowest to highest value, the highest being the `clip_quantile`. "quantile": 5th to 95th percentile, and
    what lies outside is clipped. Raises ValueError for another name.
    """
    if scaling not in ("minmax", "quantile"):
        raise ValueError(f"scaling must be one of minmax, quantile, got {scaling!r}")
    values_T = values_T.to(torch.promote_types(values_T.dtype, torch.float32))
    if len(values_T) == 0:
        return values_T
    if scaling == "minmax":
        low, high = values_T.min(), quantile(values_T, clip_quantile)
    else:
        low, high = quantile(values_T, 0.05), quantile(values_T, 0.95)
    if low == high:
        return torch.zeros_like(values_T)
    return (values_T.clamp(low, high) - low) / (high - low)


def quantile(values_T: Tensor, share: float) -> Tensor:
    """The value below which `share` (0 to 1) of at least one value lies, linear between neighbours.

    As torch.quantile, which refuses the 2**24 tokens that a large global batch can hold.
    """
    position = share * (len(values_T) - 1)
    below = int(position)
    above = min(below + 1, len(values_T) - 1)
    low, high = (values_T.kthvalue(rank + 1).values for rank in (below, above))
    return torch.lerp(low, high, position - below)


def ranks(values_T: Tensor) -> Tensor:
    """Each value's place in the order of the batch, from 0 (lowest) to 1, float64 [T]; equal values share their mean.

    One value alone has 0.
    """
    _, group_T, size_G = values_T.unique(return_inverse=True, return_counts=True)
    place_G = size_G.cumsum(0) - (size_G + 1) / 2.0
    return place_G.double()[group_T] / max(1, len(values_T) - 1)
