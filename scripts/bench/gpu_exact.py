"""A part of gpu_check.py that must hold: the head over the whole vocabulary, against dense computations of the same."""
# N rows, V vocabulary

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gpu_errors import Check
from gpu_head import HeadCase, Results, dense_events, loss_checks
from opsd.ops.head.exact import exact_head_loss


def exact_head(*, device: str, dtype: str, rows: int, vocab: int, width: int, teacher_width: int) -> list[Check]:
    """Values and gradients of the exact loss against dense float64 on the same rounded inputs."""
    student = HeadCase.random(device, dtype, rows=rows, vocab=vocab, width=width, named=1)
    teacher = HeadCase.random(device, dtype, rows=rows, vocab=vocab, width=teacher_width, named=1, seed=1)
    models = (student, teacher)
    return loss_checks(dtype, rows, partial(exact_loss, *models), partial(dense_loss, *models))


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
