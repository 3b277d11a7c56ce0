"""Divergences of the student from the teacher on bucket log-probabilities: one function a variant, in `DIVERGENCES`.

Every entry maps log-probabilities [N, B] of student and teacher (nats; each row's exp sums to 1) to [N] nats, >= 0 up
to rounding, differentiable in both. On a coarse set of buckets the value is a lower bound of the dense divergence and
equals it where every token has a bucket of its own. All raise ValueError where the shapes differ or an option leaves
its range. Source: METHODS section 1.

A bucket that is impossible for both (an empty slot) adds 0 to value and gradient. Where only the second argument of a
KL is impossible, the value is +inf, as it must be; callers floor the teacher's rest so that it does not come up there.
"""
# N tokens, B buckets

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def reverse_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """KL(student || teacher): the student leaves what the teacher finds unlikely."""
    _check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    return _kl(student_logprobs_NB, teacher_logprobs_NB)


def forward_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """KL(teacher || student): the student covers all that the teacher finds likely."""
    _check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    return _kl(teacher_logprobs_NB, student_logprobs_NB)


def jsd(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student.

    beta 0 is forward KL and beta 1 is reverse KL, by definition: the formula itself is 0 there.
    Source: GKD, arXiv 2306.13649.
    """
    _check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    _check_share("beta", beta)
    if beta == 0.0:
        return _kl(teacher_logprobs_NB, student_logprobs_NB)
    if beta == 1.0:
        return _kl(student_logprobs_NB, teacher_logprobs_NB)
    middle_NB = _mixture(teacher_logprobs_NB, student_logprobs_NB, beta)
    return beta * _kl(teacher_logprobs_NB, middle_NB) + (1.0 - beta) * _kl(student_logprobs_NB, middle_NB)


def skew_forward_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student) <= log(1 / alpha). Source: DistiLLM, arXiv 2402.03898."""
    _check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    _check_share("alpha", alpha)
    return _kl(teacher_logprobs_NB, _mixture(teacher_logprobs_NB, student_logprobs_NB, alpha))


def skew_reverse_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(student || alpha student + (1 - alpha) teacher) <= log(1 / alpha). Source: DistiLLM, arXiv 2402.03898."""
    _check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    _check_share("alpha", alpha)
    return _kl(student_logprobs_NB, _mixture(student_logprobs_NB, teacher_logprobs_NB, alpha))


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


def _kl(from_logprobs_NB: Tensor, to_logprobs_NB: Tensor) -> Tensor:
    """sum_b p_b (log p_b - log q_b). Filling BEFORE the product keeps 0 * inf out of the gradient too."""
    impossible_NB = from_logprobs_NB == -math.inf
    log_p_NB = from_logprobs_NB.masked_fill(impossible_NB, 0.0)
    log_q_NB = to_logprobs_NB.masked_fill(impossible_NB, 0.0)
    return (log_p_NB.exp() * (log_p_NB - log_q_NB)).sum(-1)


def _mixture(first_logprobs_NB: Tensor, second_logprobs_NB: Tensor, share: float) -> Tensor:
    """log(share * first + (1 - share) * second); -inf, with gradient 0, where the mixture has no mass."""
    first_NB = first_logprobs_NB + _log(share)
    second_NB = second_logprobs_NB + _log(1.0 - share)
    impossible_NB = (first_NB == -math.inf) & (second_NB == -math.inf)
    mixed_NB = torch.logaddexp(first_NB.masked_fill(impossible_NB, 0.0), second_NB.masked_fill(impossible_NB, 0.0))
    return mixed_NB.masked_fill(impossible_NB, -math.inf)


def _log(share: float) -> float:
    return math.log(share) if share > 0.0 else -math.inf


def _check_shapes(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> None:
    if student_logprobs_NB.shape != teacher_logprobs_NB.shape:
        raise ValueError(
            f"student and teacher must have the same buckets, got {tuple(student_logprobs_NB.shape)} "
            f"and {tuple(teacher_logprobs_NB.shape)}"
        )


def _check_share(name: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {share}")
