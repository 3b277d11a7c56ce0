"""How much each token of a batch is worth training on: one score per token, from how the two models see it.

    SCORES[name](stats, options) -> Tensor [T]

`options` is a ScoreOptions, the same for every entry, used or not; those of this file do without it, too. What an entry
takes by name are options of its own, `selector.score_options`. A method of your own is one function and one entry:
`SCORES["mine"] = mine`. `READS` says which statistics a score is made of, those of `opsd.ops.signals.STATISTICS` among
them, and so which of these a run computes. A score of a statistic that `stats` lacks raises ValueError.
Source: docs/selection.md, Scores; equations are of TIP, arXiv 2604.14084.
"""
# T response tokens of the global batch

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from opsd.ops.signals import STATISTICS
from opsd.types import TokenStats
from tip.scaling import ranks, scale_axis


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


def dial(stats: TokenStats, options: ScoreOptions = DEFAULTS, *, beta: float = 1.0) -> Tensor:
    """High where the models' probabilities of the sampled token differ: |log q/p|^(1 - beta) |q - p|^beta, >= 0.

    That is L^beta |log q/p| with the logarithmic mean L of p and q. `beta`, at least 0: 0 is the log-ratio alone, 1 the
    difference alone; the paper has 1 and 1.2. Source: DIAL-OPD, arXiv 2610.11659.
    """
    if not beta >= 0.0:
        raise ValueError(f"beta must be at least 0, got {beta}")
    student_T, teacher_T = sampled_logprobs(stats)
    ratio_T = (teacher_T - student_T).abs()
    gap_T = torch.maximum(teacher_T, student_T).exp() * -torch.expm1(-ratio_T)
    return torch.where(ratio_T > 0.0, ratio_T ** (1.0 - beta) * gap_T**beta, 0.0)


def ier(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where a draw says much of the reverse KL's gradient for its noise: `opsd.ops.signals.ier`, >= 0.

    Source: IER, arXiv 2609.24432.
    """
    return known(stats, "ier_T")


def or_ier(other: Callable[..., Tensor], stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the other score or `ier` is: u + v - u v of their ranks in the batch, in [0, 1]. arXiv 2609.24432."""
    other_T, ier_T = ranks(other(stats, options)), ranks(ier(stats))
    return other_T + ier_T - other_T * ier_T


def and_ier(other: Callable[..., Tensor], stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the other score and `ier` both are: the product of their ranks, in [0, 1]. arXiv 2609.24432."""
    return ranks(other(stats, options)) * ranks(ier(stats))


def sampled_rkl(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the sampled token is likelier to the student than to the teacher: log p - log q, nats. A control.

    Its mean over draws is the reverse KL, so it is what one draw knows of `divergence`.
    """
    student_T, teacher_T = sampled_logprobs(stats)
    return student_T - teacher_T


def sampled_rkl_min(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """The negated sampled_rkl: high where the teacher finds the sampled token likelier. A control."""
    return -sampled_rkl(stats)


def sparse_advantage(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the sampled token's log-ratio is extreme, on either side: |log q - log p|, nats.

    The paper keeps 0.05 % of an answer by it. Source: arXiv 2609.04565.
    """
    return sampled_rkl(stats).abs()


def surprisal(stats: TokenStats, options: ScoreOptions = DEFAULTS) -> Tensor:
    """High where the student sampled what it finds unlikely: -log p, nats. Knows of no teacher. arXiv 2608.31046."""
    return -known(stats, "student_logprob_T")


FUSED = {"entropy": entropy, "divergence": divergence, "soft_or": soft_or, "dial": dial}  # with ier, by their ranks

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
    "dial": dial,
    "ier": ier,
    **{f"{name}_or_ier": partial(or_ier, score) for name, score in FUSED.items()},
    **{f"{name}_and_ier": partial(and_ier, score) for name, score in FUSED.items()},
    "sampled_rkl": sampled_rkl,
    "sampled_rkl_min": sampled_rkl_min,
    "sparse_advantage": sparse_advantage,
    "surprisal": surprisal,
}

SAMPLED = ("student_logprob_T", "teacher_logprob_T")

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
    "dial": SAMPLED,
    "ier": ("ier_T",),
    "sampled_rkl": SAMPLED,
    "sampled_rkl_min": SAMPLED,
    "sparse_advantage": SAMPLED,
    "surprisal": ("student_logprob_T",),
}
READS |= {f"{name}_{how}_ier": (*READS[name], "ier_T") for name in FUSED for how in ("or", "and")}

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


def sampled_logprobs(stats: TokenStats) -> tuple[Tensor, Tensor]:
    """log p and log q of the sampled token [T], float32 or wider."""
    student_T, teacher_T = known(stats, "student_logprob_T"), known(stats, "teacher_logprob_T")
    dtype = torch.promote_types(student_T.dtype, torch.float32)
    return student_T.to(dtype), teacher_T.to(dtype)


def scaled_entropy(stats: TokenStats, options: ScoreOptions) -> Tensor:
    """Entropy [T] in [0, 1]; "minmax" first cuts it at its `clip_quantile`."""
    return scale_axis(stats.entropy_T, options.scaling, clip_quantile=options.clip_quantile)
