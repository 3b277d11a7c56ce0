"""What a token's buckets say of its importance, beside entropy and the divergences: a function each, in `STATISTICS`.

    STATISTICS[name](student_logprobs_NB, teacher_logprobs_NB) -> [N], for TokenStats.extra[name]

Arguments are log-probabilities [N, B] of student and teacher, as a divergence's (losses/divergences.py), the rest
last; there may be no row at all. An entry that needs the token ids of the buckets says so:
`RowFunction(mine, inputs=("support_NU",))`. A run computes those that its selection asks for, where the buckets are.
Nothing is learnt through these: their gradients are not finite where a bucket is empty.
Source: docs/selection.md, Statistics of a token.
"""
# N tokens, B buckets, U = B - 1 named tokens

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from opsd.ops.losses.kl import check_shapes, kl_terms
from opsd.ops.row_function import RowFunction, check_row_values, name_of

LEAST_NOISE = 1e-8  # of `ier`, squared nats: below it, a draw says as much as the whole row

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


def ier(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, support_NU: Tensor, clip: float = 30.0) -> Tensor:
    """How much a draw of one token says of the reverse KL's gradient, beside how noisy it is: [N], >= 0.

    Over the named tokens, p renormalised among them, with the cost c = log p - log q cut at +-`clip` nats and
    L = 1 / p - 1, the squared length of a draw's step: the baseline of least noise is b = E[c L] / E[L], and the value
    Var(c) / max(E[(c - b)^2 L] - Var(c), 1e-8), all under p. 0 where one token is named.
    Top-k: on the named tokens alone, blind to the mass of the rest. Source: IER, arXiv 2609.24432.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    student_NU, teacher_NU = _named(student_logprobs_NB, support_NU), _named(teacher_logprobs_NB, support_NU)
    is_token_NU = ~(student_NU.isneginf() & teacher_NU.isneginf())
    log_p_NU = student_NU - student_NU.logsumexp(-1, keepdim=True)
    cost_NU = (log_p_NU - teacher_NU).where(is_token_NU, 0.0).clamp(-clip, clip)
    p_NU = log_p_NU.exp()
    p_times_length_NU = (1.0 - p_NU).where(is_token_NU, 0.0)
    mean_N1 = (p_NU * cost_NU).sum(-1, keepdim=True)
    variance_N = (p_NU * (cost_NU - mean_N1).square()).sum(-1)
    length_N1 = p_times_length_NU.sum(-1, keepdim=True)
    baseline_N1 = (p_times_length_NU * cost_NU).sum(-1, keepdim=True) / length_N1.where(length_N1 > 0.0, 1.0)
    second_moment_N = (p_times_length_NU * (cost_NU - baseline_N1).square()).sum(-1)
    return variance_N / (second_moment_N - variance_N).clamp_min(LEAST_NOISE)


def teacher_rank(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, support_NU: Tensor) -> Tensor:
    """How many named tokens the teacher finds likelier than the student's likeliest named token, [N]: 0, 1, 2 ...

    Top-k: exact where the support holds the student's likeliest token and the teacher's as far as the rank counts;
    else tokens without a name are not counted. Source: SelecTKD, arXiv 2510.24021.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    teacher_NU = _named(teacher_logprobs_NB, support_NU)
    likeliest_N1 = _named(student_logprobs_NB, support_NU).argmax(-1, keepdim=True)
    return (teacher_NU > teacher_NU.gather(-1, likeliest_N1)).sum(-1).to(student_logprobs_NB.dtype)


def _named(logprobs_NB: Tensor, support_NU: Tensor) -> Tensor:
    """Without the rest, which a row that names the whole vocabulary need not have."""
    return logprobs_NB[:, : support_NU.shape[1]]


STATISTICS: dict[str, Callable[..., Tensor]] = {
    "hellinger_T": hellinger,
    "grad_norm_T": reverse_kl_grad_norm,
    "ier_T": RowFunction(ier, inputs=("support_NU",)),
    "teacher_rank_T": RowFunction(teacher_rank, inputs=("support_NU",)),
}


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
