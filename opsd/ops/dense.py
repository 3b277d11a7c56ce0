"""The divergences over the whole vocabulary, in float64, written from their definitions: what the fast code must equal.

For tests, and for a teacher that has all its logits at hand. Needs several float64 tensors [N, V].
"""
# N tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense_divergence(name: str, student_logits_NV: Tensor, teacher_logits_NV: Tensor, **options: float) -> Tensor:
    """The divergence `name` of two softmax distributions at temperature 1: [N] nats, float64, >= 0.

    `options` are those of the entry of the same name in `opsd.ops.divergences`, with the same defaults.
    A logit may be -inf on both sides (no such token), for the value only. Source: METHODS section 1.
    """
    student_NV = student_logits_NV.double().softmax(-1)
    teacher_NV = teacher_logits_NV.double().softmax(-1)
    return _DENSE[name](student_NV, teacher_NV, **options)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def _jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    if beta in (0.0, 1.0):
        return _kl(teacher, student) if beta == 0.0 else _kl(student, teacher)
    middle = beta * teacher + (1.0 - beta) * student
    return beta * _kl(teacher, middle) + (1.0 - beta) * _kl(student, middle)


_DENSE: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": lambda student, teacher: _kl(student, teacher),
    "forward_kl": lambda student, teacher: _kl(teacher, student),
    "jsd": _jsd,
    "skew_forward_kl": lambda student, teacher, alpha=0.1: _kl(teacher, alpha * teacher + (1 - alpha) * student),
    "skew_reverse_kl": lambda student, teacher, alpha=0.1: _kl(student, alpha * student + (1 - alpha) * teacher),
}
