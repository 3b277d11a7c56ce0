"""How much each token of a batch is worth training on: one score per token, from how the two models see it.

    SCORES[name](stats, options) -> Tensor [T]

`options` is a ScoreOptions, the same for every entry, used or not; those of this file do without it, too. A method of
your own is one function and one entry: `SCORES["mine"] = mine`. `READS` says which statistics a score is made of, those
of `opsd.ops.signals.STATISTICS` among them, and so which of these a run computes. A score of a statistic that `stats`
lacks raises ValueError.
Source: docs/methods.md, Scores; equations are of TIP, arXiv 2604.14084.
"""
# T response tokens of the global batch

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from opsd.ops.signals import STATISTICS
from opsd.types import TokenStats


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """What a run's settings say to its score."""

    # How an axis comes to [0, 1]: minmax, as in the paper | quantile, which no outlier flattens.
    scaling: str = "minmax"
    clip_quantile: float = 0.98  # minmax only: the entropy is cut at this quantile first; 1 leaves it whole
    generator: Generator | None = None  # for a score that draws; None: torch's global one


DEFAULTS = ScoreOptions()


def soft_or(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the student is unsure OR far from the teacher: h + d - h * d of the scaled axes, in [0, 1]. Eq. 7."""
    entropy_T = scaled_entropy(stats, options)
    divergence_T = scale_axis(stats.reverse_kl_T, options.scaling)
    return entropy_T + divergence_T - entropy_T * divergence_T


def entropy(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the student is unsure, in [0, 1]."""
    return scaled_entropy(stats, options)


def divergence(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the student is far from the teacher: the reverse KL itself, nats. App. B.2."""
    return stats.reverse_kl_T


def q3(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the student is sure and wrong: forward KL * (1 - scaled entropy), nats. Section 7.3."""
    return stats.forward_kl_T * (1 - scaled_entropy(stats, options))


def random(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """Uniform in [0, 1), blind to the token: the baseline that any other score must beat."""
    return torch.rand(len(stats), generator=options.generator)


def bottom(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """The negated soft_or, in [-1, 0]: keeps what it would drop. A control. Table 6."""
    return -soft_or(stats, options)


def hellinger(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the two models differ anywhere, head or tail: the Hellinger distance itself, in [0, 1].

    Source: AdaKD, arXiv 2510.11615.
    """
    return known(stats, "hellinger_T")


def grad_norm(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the reverse KL pulls hard at the student's logits: the 2-norm of its gradient there, >= 0."""
    return known(stats, "grad_norm_T")


def teachability(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the teacher disagrees within what the student already holds likely, in [0, 1].

    The forward KL times the teacher's mass on the student's candidates, each scaled by "quantile" whatever the options
    say: the score is defined so. Source: arXiv 2605.26844.
    """
    compatibility_T = scale_axis(known(stats, "compatibility_T"), "quantile")
    return scale_axis(stats.forward_kl_T, "quantile") * compatibility_T


def attention(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the teacher looks back to: the mean attention that it pays to the token. Needs teacher.attention."""
    return known(stats, "attention_T")


SCORES: dict[str, Callable[..., Tensor]] = {
    "soft_or": soft_or,
    "entropy": entropy,
    "divergence": divergence,
    "q3": q3,
    "random": random,
    "bottom": bottom,
    "hellinger": hellinger,
    "grad_norm": grad_norm,
    "teachability": teachability,
    "attention": attention,
}

READS: dict[str, tuple[str, ...]] = {
    "soft_or": ("entropy_T", "reverse_kl_T"),
    "entropy": ("entropy_T",),
    "divergence": ("reverse_kl_T",),
    "q3": ("entropy_T", "forward_kl_T"),
    "random": (),
    "bottom": ("entropy_T", "reverse_kl_T"),
    "hellinger": ("hellinger_T",),
    "grad_norm": ("grad_norm_T",),
    "teachability": ("forward_kl_T", "compatibility_T"),
    "attention": ("attention_T",),
}

# The statistics of every run that compare the two models, as all of STATISTICS do. They see only the tokens on which
# both log-probabilities are known, so they are no better than TokenStats.named_mass_T: of a student far from a teacher
# that names its top K, the order by divergence was chance (rank correlation -0.04 with the dense one, where soft_or
# kept 0.91). stats=learner makes the entropy exact and these not: only a teacher that scores the student's candidates,
# or a larger K, helps.
COMPARING = frozenset({"reverse_kl_T", "forward_kl_T", "compatibility_T"})


def compares(reads: Collection[str]) -> bool:
    """Whether one of these statistics compares the two models."""
    return any(name in COMPARING or name in STATISTICS for name in reads)


def compares_models(name: str) -> bool:
    """Whether the score of this name reads what compares the models; one of a user's own may, unless READS says not."""
    return name not in READS or compares(READS[name])


def known(stats: TokenStats, name: str) -> Tensor:
    """A statistic that a run need not have. Raises ValueError where it is not there."""
    value_T = stats.known().get(name)
    if value_T is None:
        raise ValueError(
            f"this needs the statistic {name}, which is not known: a run has it where READS says that it is read, and "
            "attention_T with teacher.attention=true; statistics of your own must bring it"
        )
    return value_T


def scaled_entropy(stats: TokenStats, options: ScoreOptions) -> Tensor:
    """Entropy [T] in [0, 1]; "minmax" first cuts it at its `clip_quantile`."""
    return scale_axis(stats.entropy_T, options.scaling, clip_quantile=options.clip_quantile)


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
