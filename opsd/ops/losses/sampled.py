"""Losses that treat a token by how likely it is to either model: policy gradients with another reward, and gates.

Each maps log-probabilities [N, B] of student and teacher, the sampled event y in slot 0, to [N]. With pi the student, q
the teacher and d = log q(y) - log pi(y), plain distillation on the sampled token is -d log pi(y) with d detached, whose
expected gradient is that of KL(pi || q). Of a policy gradient only the gradient has a meaning, not the value. All raise
ValueError where shapes differ or an option leaves its range. Source: docs/losses.md, Objectives of the sampled token.
"""
# N tokens, B buckets

from __future__ import annotations

import math

import torch
from torch import Tensor

from opsd.ops.losses.kl import check_shapes, kl

OUTSIDE = ("forward_kl", "clipped")


def sign_log(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """-A log pi(y), A = sign(d) log(1 + |d|) detached: a large gap counts, but not by its length. arXiv 2607.13399."""
    difference_N = _difference(student_logprobs_NB, teacher_logprobs_NB)
    return -difference_N.sign() * difference_N.abs().log1p() * student_logprobs_NB[:, 0]


def power(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, alpha: float = 1.0) -> Tensor:
    """-A log pi(y), A = (q(y)^alpha - pi(y)^alpha) / alpha detached: bounded by 1 / alpha, and d as alpha goes to 0.

    Source: PowerOPD, arXiv 2606.17199.
    """
    if not 0.0 < alpha < math.inf:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    difference_N = _difference(student_logprobs_NB, teacher_logprobs_NB)
    student_N = student_logprobs_NB[:, 0]
    reward_N = (alpha * student_N.detach()).exp() * torch.expm1(alpha * difference_N) / alpha
    return -reward_N * student_N


def sign_gate(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """-d log pi(y) where d > 0, which makes y likelier; KL(q || pi) elsewhere, which says what to do in place of y.

    The forward KL is on the row's buckets, the rest included, where the paper's is on the teacher's top K alone.
    Source: AOPD, arXiv 2605.06387.
    """
    difference_N = _difference(student_logprobs_NB, teacher_logprobs_NB)
    forward_N = kl(teacher_logprobs_NB, student_logprobs_NB)
    return torch.where(difference_N > 0.0, -difference_N * student_logprobs_NB[:, 0], forward_N)


def trust(
    student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, bound: float = 0.1, outside: str = "forward_kl"
) -> Tensor:
    """KL(pi || q) where min(q(y) / pi(y), 1) > `bound`, so the teacher finds y likely enough; elsewhere `outside`.

    "forward_kl": KL(q || pi). "clipped": the reverse KL with each bucket's cost log(pi / q) cut at -log `bound`; the
    cost is detached there, so where nothing is cut the gradient is the reverse KL's. Whether a token is inside depends
    on the draw, and has no gradient. The bound's default is ours. Without the paper's answers that the teacher begins.
    Source: TrOPD, arXiv 2606.01249.
    """
    if not 0.0 < bound < 1.0:
        raise ValueError(f"bound must be in (0, 1), got {bound}")
    if outside not in OUTSIDE:
        raise ValueError(f"outside must be one of {', '.join(OUTSIDE)}, got {outside!r}")
    inside_N = _difference(student_logprobs_NB, teacher_logprobs_NB) > math.log(bound)
    reverse_N = kl(student_logprobs_NB, teacher_logprobs_NB)
    if outside == "forward_kl":
        return torch.where(inside_N, reverse_N, kl(teacher_logprobs_NB, student_logprobs_NB))
    return torch.where(inside_N, reverse_N, _clipped(student_logprobs_NB, teacher_logprobs_NB, -math.log(bound)))


def _clipped(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, most: float) -> Tensor:
    """sum_b pi_b min(log(pi_b / q_b), most), the second factor detached."""
    impossible_NB = student_logprobs_NB == -math.inf
    student_NB = student_logprobs_NB.masked_fill(impossible_NB, 0.0)
    cost_NB = (student_NB - teacher_logprobs_NB.masked_fill(impossible_NB, 0.0)).detach().clamp_max(most)
    return (student_NB.exp() * cost_NB).masked_fill(impossible_NB, 0.0).sum(-1)


def _difference(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """d = log q(y) - log pi(y), detached, [N]."""
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    return (teacher_logprobs_NB[:, 0] - student_logprobs_NB[:, 0]).detach()
