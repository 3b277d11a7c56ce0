"""A part of gpu_check.py that must hold: the head over the whole vocabulary, against dense computations of the same."""
# N rows, V vocabulary

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_errors import DTYPES, SLACK, Check, relative_error
from gpu_head import HeadCase, dense_events
from opsd.ops.head.exact import exact_head_loss
from opsd.ops.losses.divergences import DIVERGENCES

Results = tuple[Tensor, ...]  # divergence [N], gradient of hidden, gradient of weight


def exact_head(*, device: str, dtype: str, rows: int, vocab: int, width: int, teacher_width: int) -> list[Check]:
    """Values and gradients of the exact loss against dense float64 on the same rounded inputs."""
    student = HeadCase.random(device, dtype, rows=rows, vocab=vocab, width=width, named=1)
    teacher = HeadCase.random(device, dtype, rows=rows, vocab=vocab, width=teacher_width, named=1, seed=1)
    checks = []
    for name in ("reverse_kl", "forward_kl", "jsd"):
        exact = dense_loss(student, teacher, DIVERGENCES[name], torch.float64)
        plain = dense_loss(student, teacher, DIVERGENCES[name], DTYPES[dtype])
        for chunk_rows in (None, 1 + rows // 3):
            found = exact_loss(student, teacher, DIVERGENCES[name], chunk_rows)
            parts = zip(("value", "grad hidden", "grad weight"), found, plain, exact, strict=True)
            checks += [
                Check(
                    what=f"{name}, {'its own chunks' if chunk_rows is None else 'three chunks'}: {part}",
                    error=relative_error(own, truth),
                    allowed=2.0 * relative_error(other, truth) + SLACK[dtype],
                )
                for part, own, other, truth in parts
            ]
    return checks


def exact_loss(student: HeadCase, teacher: HeadCase, divergence: Callable[..., Tensor], chunk: int | None) -> Results:
    hidden_ND, weight_VD = student.leaves()
    loss, value_N = exact_head_loss(
        hidden_ND,
        weight_VD,
        teacher.hidden_ND,
        teacher.weight_VD,
        student.weight_N,
        divergence,
        chunk_rows=chunk,
        **student.events,
    )
    loss.backward()
    return value_N, hidden_ND.grad, weight_VD.grad


def dense_loss(student: HeadCase, teacher: HeadCase, divergence: Callable[..., Tensor], dtype: torch.dtype) -> Results:
    """By autograd through all logits of both."""
    hidden_ND, weight_VD = student.leaves(dtype)
    sides = (hidden_ND, weight_VD), (x.detach() for x in teacher.leaves(dtype))
    student_NV, teacher_NV = (
        (dense_events(student, *side) / student.temperature_N[:, None].to(dtype)).log_softmax(1) for side in sides
    )
    value_N = divergence(student_NV.double(), teacher_NV.double())
    (student.weight_N * value_N).sum().backward()
    return value_N.detach(), hidden_ND.grad, weight_VD.grad
