"""Which tokens a score keeps, and with what weight.

    SELECTORS[name](score_T, lengths, *, ratio=1.0, scope="rollout", generator=None) -> Selection

`score_T` holds the tokens of all rollouts one after another, `lengths` the number of tokens of each rollout. `ratio`
is the share that stays, of each rollout (`scope` "rollout") or of the whole batch ("batch"). Every entry takes the
same options, used or not, and raises ValueError where lengths do not sum to T, or where a score that it needs is not
finite. Source: docs/selection.md, Selectors; TIP, arXiv 2604.14084, eq. 8.
"""
# T response tokens of the global batch, N kept tokens

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Generator, Tensor

from opsd.types import Selection


def keep_all(
    score_T: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    ratio: float = 1.0,
    scope: str = "rollout",
    generator: Generator | None = None,
) -> Selection:
    """Every token with weight 1: plain distillation. Ignores the score, `ratio` and `scope`."""
    check_lengths(score_T, lengths)
    return Selection(index_N=torch.arange(len(score_T)), weight_N=torch.ones(len(score_T)))


def top_ratio(
    score_T: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    ratio: float = 1.0,
    scope: str = "rollout",
    generator: Generator | None = None,
) -> Selection:
    """The floor(ratio * m) highest of m tokens, at least one, with weight 1. Of equal scores the earlier stays."""
    check_finite(score_T)
    kept_T = torch.zeros(len(score_T), dtype=torch.bool)
    group_sizes = split_sizes(score_T, lengths, scope)
    for group_scores, group_kept in zip(score_T.split(group_sizes), kept_T.split(group_sizes), strict=True):
        order = group_scores.argsort(descending=True, stable=True)
        group_kept[order[: num_kept(len(group_scores), ratio)]] = True  # a view: writes into kept_T
    index_N = kept_T.nonzero().flatten()
    return Selection(index_N=index_N, weight_N=torch.ones(len(index_N)))


def prefix(
    score_T: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    ratio: float = 1.0,
    scope: str = "rollout",
    generator: Generator | None = None,
) -> Selection:
    """The first tokens of each rollout, as many as `top_ratio` keeps, with weight 1. Ignores the score: a control.

    With `scope` "batch" all rollouts are cut at about the same place. Source: Prefix OPD, arXiv 2602.15260.
    """
    position_T = torch.cat([torch.arange(length) for length in check_lengths(score_T, lengths)] or [torch.arange(0)])
    return top_ratio(-position_T, lengths, ratio=ratio, scope=scope)


def sampled(
    score_T: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    ratio: float = 1.0,
    scope: str = "rollout",
    generator: Generator | None = None,
) -> Selection:
    """As many tokens as `top_ratio`, drawn one by one without replacement with probability proportional to score.

    Scores are made non-negative by `as_weights`. A token of weight 0 is drawn only when no other is left in its group,
    and those are equally likely. Weights are 1: no correction by 1 / probability, the draw is meant to lean.
    """
    # The smallest of exponential draws with these rates follow exactly that law: no loop over draws.
    arrival_T = torch.empty(len(score_T), dtype=torch.float64).exponential_(generator=generator)
    # 1e-200: later than any token of positive float32 weight, yet no overflow that would make ties.
    arrival_T /= as_weights(score_T).clamp_min(1e-200)
    return top_ratio(-arrival_T, lengths, ratio=ratio, scope=scope)


def soft(
    score_T: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    ratio: float = 1.0,
    scope: str = "rollout",
    generator: Generator | None = None,
) -> Selection:
    """Every token with weight score / mean(score) over the batch, or 1 where all scores are 0.

    Scores are made non-negative by `as_weights`. Ignores `ratio` and `scope`: nothing is dropped.
    """
    check_lengths(score_T, lengths)
    weight_T = as_weights(score_T)
    weight_T = weight_T / weight_T.mean() if weight_T.any() else torch.ones_like(weight_T)
    return Selection(index_N=torch.arange(len(score_T)), weight_N=weight_T.float())


SELECTORS: dict[str, Callable[..., Selection]] = {
    "all": keep_all,
    "top_ratio": top_ratio,
    "prefix": prefix,
    "sampled": sampled,
    "soft": soft,
}


def num_kept(length: int, ratio: float) -> int:
    """floor(ratio * length), at least 1 of a non-empty group; exact for the decimal as written: 0.3 of 10 is 3."""
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    return min(length, max(1, math.floor(Fraction(str(ratio)) * length)))


def split_sizes(score_T: Tensor, lengths: Sequence[int] | Tensor, scope: str) -> list[int]:
    """Sizes of the groups within which tokens compete. Raises ValueError for an unknown scope or wrong lengths."""
    group_sizes = {"rollout": check_lengths(score_T, lengths), "batch": [len(score_T)]}
    if scope not in group_sizes:
        raise ValueError(f"scope must be one of {', '.join(group_sizes)}, got {scope!r}")
    return group_sizes[scope]


def check_lengths(score_T: Tensor, lengths: Sequence[int] | Tensor) -> list[int]:
    """`lengths` as a list. Raises ValueError where it does not cut a [T] score into rollouts."""
    sizes = [int(length) for length in torch.as_tensor(lengths).tolist()]
    if score_T.ndim != 1 or min(sizes, default=0) < 0 or sum(sizes) != len(score_T):
        raise ValueError(f"lengths must be >= 0 and sum to T, got sum {sum(sizes)} for scores {tuple(score_T.shape)}")
    return sizes


def check_finite(score_T: Tensor) -> None:
    num_bad = int((~score_T.isfinite()).sum())
    if num_bad:
        raise ValueError(f"scores must be finite, got {num_bad} of {len(score_T)} that are not")


def as_weights(score_T: Tensor) -> Tensor:
    """Scores as float64 weights >= 0: where any is negative, all are raised by as much as brings the lowest to 0."""
    check_finite(score_T)
    score_T = score_T.double()
    return score_T - score_T.amin().clamp_max(0) if len(score_T) else score_T
