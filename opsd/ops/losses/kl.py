"""What the divergences on buckets are made of: the terms of a KL, a mixture of two distributions, checked arguments.

Arguments are log-probabilities [N, B], nats; -inf marks a bucket without mass.
"""
# N tokens, B buckets

from __future__ import annotations

import math

import torch
from torch import Tensor


def kl(from_logprobs_NB: Tensor, to_logprobs_NB: Tensor) -> Tensor:
    """KL(from || to), [N] nats: +inf where only `to` has no mass."""
    return kl_terms(from_logprobs_NB, to_logprobs_NB).sum(-1)


def kl_terms(from_logprobs_NB: Tensor, to_logprobs_NB: Tensor) -> Tensor:
    """The terms p_b (log p_b - log q_b) of KL(from || to), [N, B]; 0, with gradient 0, where `from` has no mass."""
    impossible_NB = from_logprobs_NB == -math.inf
    log_p_NB = from_logprobs_NB.masked_fill(impossible_NB, 0.0)  # before the product: no 0 * inf in the gradient either
    log_q_NB = to_logprobs_NB.masked_fill(impossible_NB, 0.0)
    return log_p_NB.exp() * (log_p_NB - log_q_NB)


def mixture(first_logprobs_NB: Tensor, second_logprobs_NB: Tensor, share: float) -> Tensor:
    """log(share * first + (1 - share) * second); -inf, with gradient 0, where the mixture has no mass."""
    first_NB = first_logprobs_NB + _log(share)
    second_NB = second_logprobs_NB + _log(1.0 - share)
    impossible_NB = (first_NB == -math.inf) & (second_NB == -math.inf)
    mixed_NB = torch.logaddexp(first_NB.masked_fill(impossible_NB, 0.0), second_NB.masked_fill(impossible_NB, 0.0))
    return mixed_NB.masked_fill(impossible_NB, -math.inf)


def check_shapes(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> None:
    if student_logprobs_NB.shape != teacher_logprobs_NB.shape:
        raise ValueError(
            f"student and teacher must have the same buckets, got {tuple(student_logprobs_NB.shape)} "
            f"and {tuple(teacher_logprobs_NB.shape)}"
        )


def check_share(name: str, share: float) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {share}")


def _log(share: float) -> float:
    return math.log(share) if share > 0.0 else -math.inf
