"""What a token's buckets say of its importance, beside entropy and the divergences: a function each, in `STATISTICS`.

    STATISTICS[name](student_logprobs_NB, teacher_logprobs_NB) -> [N], for TokenStats.extra[name]

Arguments are log-probabilities [N, B] of student and teacher, as a divergence's (losses/divergences.py), the rest
last; there may be no row at all. An entry that needs the token ids of the buckets says so:
`RowFunction(mine, inputs=("support_NU",))`. A run computes those that its selection asks for, where the buckets are.
Nothing is learnt through these: their gradients are not finite where a bucket is empty.
Source: docs/methods.md, Statistics of a token.
"""
# N tokens, B buckets, U = B - 1 named tokens

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from opsd.ops.losses.kl import check_shapes, kl_terms
from opsd.ops.row_function import RowFunction, check_row_values, name_of

Statistics = Mapping[str, Callable[..., Tensor]]  # name in TokenStats.extra -> function of the buckets


def hellinger(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """The Hellinger distance sqrt(1/2 sum_b (sqrt p_b - sqrt q_b)^2), [N] in [0, 1]; 1: no mass in common.

    Top-k: a lower bound of the distance over all tokens. Raises ValueError where the shapes differ.
    Source: AdaKD, arXiv 2510.11615.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    gap_NB = (student_logprobs_NB / 2).exp() - (teacher_logprobs_NB / 2).exp()
    return (gap_NB.square().sum(-1) / 2).sqrt().clamp_max(1.0)


def reverse_kl_grad_norm(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """The 2-norm of the reverse KL's gradient in the student's logits, one logit a bucket: [N], >= 0.

    That gradient is p_b (log(p_b / q_b) - KL(p || q)). +inf where the KL is.
    Top-k: the one logit of the rest moves all its tokens, so this is at least the norm of the sparse loss's gradient in
    the logits of the single tokens. Raises ValueError where the shapes differ.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    terms_NB = kl_terms(student_logprobs_NB, teacher_logprobs_NB)
    kl_N = terms_NB.sum(-1)
    gradient_NB = terms_NB - student_logprobs_NB.exp() * kl_N[..., None]
    return gradient_NB.norm(dim=-1).masked_fill(kl_N == math.inf, math.inf)


STATISTICS: dict[str, Callable[..., Tensor]] = {"hellinger_T": hellinger, "grad_norm_T": reverse_kl_grad_norm}


def statistics_of(
    functions: Statistics,
    student_logprobs_NB: Tensor,
    teacher_logprobs_NB: Tensor,
    support_NU: Tensor,
) -> dict[str, Tensor]:
    """What each function says of the rows, [N]. Raises ValueError, naming one that returns something else."""
    found = {}
    for name, function in functions.items():
        entry = RowFunction.of(function)
        value_N = entry(student_logprobs_NB, teacher_logprobs_NB, **entry.takes({"support_NU": support_NU}))
        check_row_values(f"the statistic {name}: {name_of(entry)}", value_N, len(student_logprobs_NB))
        found[name] = value_N
    return found
