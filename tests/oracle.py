"""The divergences over the whole vocabulary, in float64, written from their definitions: what the fast code must equal.

For tests, and for a teacher that has all its logits at hand. Needs several float64 tensors [N, V], AKL [N, V, V].
"""
# N tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense_divergence(name: str, student_logits_NV: Tensor, teacher_logits_NV: Tensor, **options: float | str) -> Tensor:
    """The divergence `name` of two softmax distributions at temperature 1: [N] nats, float64, >= 0.

    `options` are those of the entry of the same name in `opsd.ops.losses.divergences`, with the same defaults.
    A logit may be -inf on both sides (no such token), for the value only.
    Source: docs/losses.md, Divergences and Token-adaptive divergences.
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


def _todi(student: Tensor, teacher: Tensor) -> Tensor:
    share = (teacher / (teacher + student)).detach().nan_to_num(nan=0.5)
    forward = torch.xlogy(teacher, teacher) - torch.xlogy(teacher, student)
    reverse = torch.xlogy(student, student) - torch.xlogy(student, teacher)
    return (share * forward + (1.0 - share) * reverse).sum(-1)


def _akl(student: Tensor, teacher: Tensor, head_mass: float = 0.5, crossing: str = "head") -> Tensor:
    # A token's cumulative mass: its own and that of every token below (above) it. Of equal ones the earlier counts.
    here, other = teacher[:, :, None], teacher[:, None, :]
    before = (other < here if crossing == "head" else other > here) | (other == here).tril()
    mass = (before * other).sum(-1)
    beyond = (mass > head_mass) & (before.sum(-1) > 1)
    in_tail = mass <= 1.0 - head_mass if crossing == "head" else beyond
    gap = (teacher - student).abs().detach()
    head, tail = (gap * ~in_tail).sum(-1), (gap * in_tail).sum(-1)
    weighted = head * _kl(teacher, student) + tail * _kl(student, teacher)
    return torch.where(head + tail > 0.0, weighted / (head + tail), 0.0)


def _abkd(student: Tensor, teacher: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    total = alpha + beta
    own = alpha / total * teacher**total + beta / total * student**total
    return -(teacher**alpha * student**beta - own).sum(-1) / (alpha * beta)


def _entropy_aware(student: Tensor, teacher: Tensor, threshold: float = 0.8) -> Tensor:
    is_unsure = torch.special.entr(teacher).sum(-1) > threshold
    return _kl(student, teacher) + is_unsure * _kl(teacher, student)


_DENSE: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": lambda student, teacher: _kl(student, teacher),
    "forward_kl": lambda student, teacher: _kl(teacher, student),
    "jsd": _jsd,
    "skew_forward_kl": lambda student, teacher, alpha=0.1: _kl(teacher, alpha * teacher + (1 - alpha) * student),
    "skew_reverse_kl": lambda student, teacher, alpha=0.1: _kl(student, alpha * student + (1 - alpha) * teacher),
    "todi": _todi,
    "akl": _akl,
    "abkd": _abkd,
    "entropy_aware": _entropy_aware,
}
