"""Divergences of the student from the teacher on bucket log-probabilities: a function each, by name in `DIVERGENCES`.

Every entry maps log-probabilities [N, B] of student and teacher (nats; each row's exp sums to 1) to [N] nats, >= 0 up
to rounding, differentiable in both. The value equals the dense divergence where every token has a bucket of its own;
on a coarse set of buckets it is a lower bound, save where a docstring says otherwise. All raise ValueError where the
shapes differ or an option leaves its range. Source: docs/losses.md, Divergences.

A bucket that is impossible for both (an empty slot) adds 0 to value and gradient. Where only the second argument of a
KL is impossible, the value is +inf, as it must be; callers floor the teacher's rest so that it does not come up there.

All are sums over buckets, and say so (`Loss.by_token`): given some columns of all tokens' log-probabilities they return
the part of these, and what they need of whole rows beside (`Loss.row_values`) is an argument of theirs.
"""
# N tokens, B buckets

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from opsd.ops.losses.kl import check_shapes, check_share, kl, mixture
from opsd.ops.losses.objective import Loss
from opsd.ops.losses.token_adaptive import abkd, akl, entropy_aware, head_share, is_unsure, todi


def reverse_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """KL(student || teacher): the student leaves what the teacher finds unlikely."""
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    return kl(student_logprobs_NB, teacher_logprobs_NB)


def forward_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """KL(teacher || student): the student covers all that the teacher finds likely."""
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    return kl(teacher_logprobs_NB, student_logprobs_NB)


def jsd(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, beta: float = 0.5) -> Tensor:
    """beta KL(teacher || m) + (1 - beta) KL(student || m), with m = beta teacher + (1 - beta) student.

    beta 0 is forward KL and beta 1 is reverse KL, by definition: the formula itself is 0 there.
    Source: GKD, arXiv 2306.13649.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    check_share("beta", beta)
    if beta == 0.0:
        return kl(teacher_logprobs_NB, student_logprobs_NB)
    if beta == 1.0:
        return kl(student_logprobs_NB, teacher_logprobs_NB)
    middle_NB = mixture(teacher_logprobs_NB, student_logprobs_NB, beta)
    return beta * kl(teacher_logprobs_NB, middle_NB) + (1.0 - beta) * kl(student_logprobs_NB, middle_NB)


def skew_forward_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student) <= log(1 / alpha). Source: DistiLLM, arXiv 2402.03898."""
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    check_share("alpha", alpha)
    return kl(teacher_logprobs_NB, mixture(teacher_logprobs_NB, student_logprobs_NB, alpha))


def skew_reverse_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(student || alpha student + (1 - alpha) teacher) <= log(1 / alpha). Source: DistiLLM, arXiv 2402.03898."""
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    check_share("alpha", alpha)
    return kl(student_logprobs_NB, mixture(student_logprobs_NB, teacher_logprobs_NB, alpha))


def forward_then_reverse(
    student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, reverse_share_N: Tensor
) -> Tensor:
    """(1 - share) forward KL + share reverse KL, the share [0, 1] being that of the row."""
    forward_N, reverse_N = (kl(student_logprobs_NB, teacher_logprobs_NB) for kl in (forward_kl, reverse_kl))
    return (1.0 - reverse_share_N) * forward_N + reverse_share_N * reverse_N


# Those of the buckets alone. Every loss, also one with inputs of its own, is in `opsd.ops.losses.table`.
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": Loss(reverse_kl, by_token=True),
    "forward_kl": Loss(forward_kl, by_token=True),
    "jsd": Loss(jsd, by_token=True),
    "skew_forward_kl": Loss(skew_forward_kl, by_token=True),
    "skew_reverse_kl": Loss(skew_reverse_kl, by_token=True),
    "todi": Loss(todi, by_token=True),
    "akl": Loss(akl, by_token=True, row_values={"head_share_N": head_share}),
    "abkd": Loss(abkd, by_token=True),
    "entropy_aware": Loss(entropy_aware, by_token=True, row_values={"is_unsure_N": is_unsure}),
}
