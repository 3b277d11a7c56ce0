"""Losses of the sampled event that a verifier's reward, or another credit, takes part in: KDRL and what it is made of.

Each maps log-probabilities [N, B] of student and teacher, the sampled event y in slot 0, to [N], of either sign and
differentiable in the student. With pi the student, q the teacher and A the advantage, the reward's part is
-A log pi(y): rollouts are of the current policy and a batch makes one optimiser step, so the ratio pi / pi_old of GRPO
is 1 and its clipping never acts. Only the gradient of that part has a meaning, not its value.

The teacher's part is k2 = 1/2 (log q(y) - log pi(y))^2, whose gradient is that of KL(pi || q) in expectation over y.
k1 = log pi(y) - log q(y), the usual estimate of the KL's value, is no option: as a loss its gradient is 0 in
expectation. All raise ValueError where shapes differ. Nothing here depends on how many tokens the teacher names: the
sampled event is always one of them. Source: KDRL, arXiv 2506.02208; docs/losses.md,
Objectives with rewards.
"""
# N tokens, B buckets

from __future__ import annotations

from torch import Tensor

from opsd.ops.losses.kl import check_shapes


def policy_gradient(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, advantage_N: Tensor) -> Tensor:
    """-A log pi(y): the teacher has no part in it."""
    student_N, _ = _sampled(student_logprobs_NB, teacher_logprobs_NB)
    _check_tokens("advantage_N", advantage_N, student_N)
    return -advantage_N * student_N


def kdrl(
    student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, advantage_N: Tensor, coefficient: float = 2e-3
) -> Tensor:
    """-A log pi(y) + coefficient * k2."""
    student_N, teacher_N = _sampled(student_logprobs_NB, teacher_logprobs_NB)
    _check_tokens("advantage_N", advantage_N, student_N)
    return -advantage_N * student_N + coefficient * _k2(student_N, teacher_N)


def kdrl_advantage(
    student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, advantage_N: Tensor, coefficient: float = 2e-3
) -> Tensor:
    """-(A + coefficient * d) log pi(y), d = log q(y) - log pi(y) detached: the gradient of `kdrl`, another value."""
    student_N, teacher_N = _sampled(student_logprobs_NB, teacher_logprobs_NB)
    _check_tokens("advantage_N", advantage_N, student_N)
    difference_N = (teacher_N - student_N).detach()
    return -(advantage_N + coefficient * difference_N) * student_N


def kdrl_mask(
    student_logprobs_NB: Tensor,
    teacher_logprobs_NB: Tensor,
    *,
    advantage_N: Tensor,
    wrong_N: Tensor,
    coefficient: float = 2e-3,
) -> Tensor:
    """`kdrl` with the teacher's part only where `wrong_N` (bool): in answers that the verifier refused."""
    student_N, teacher_N = _sampled(student_logprobs_NB, teacher_logprobs_NB)
    _check_tokens("advantage_N", advantage_N, student_N)
    _check_tokens("wrong_N", wrong_N, student_N)
    return -advantage_N * student_N + coefficient * _k2(student_N, teacher_N).where(wrong_N, 0.0)


def _sampled(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> tuple[Tensor, Tensor]:
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    return student_logprobs_NB[:, 0], teacher_logprobs_NB[:, 0]


def _k2(student_N: Tensor, teacher_N: Tensor) -> Tensor:
    return (teacher_N - student_N).square() / 2


def _check_tokens(name: str, values_N: Tensor, student_N: Tensor) -> None:
    if values_N.shape != student_N.shape:
        raise ValueError(f"{name} must have shape {tuple(student_N.shape)}, got {tuple(values_N.shape)}")
