"""The reverse KL on a few named tokens whose gradient is, on average over the sampled token, the dense one.

A coarse reverse KL (divergences.py) is right about the tokens that it names and sees all others as one: its gradient
has no part that tells these apart. The token y that the student sampled is a draw from its distribution, so where y is
none of the named ones it stands for them. Source: ResOPD, arXiv 2610.04882; docs/methods.md, The residual.
"""
# N tokens, B buckets

from __future__ import annotations

import math

import torch
from torch import Tensor

from opsd.ops.losses.kl import check_shapes, kl


def residual_reverse_kl(
    student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, outside_N: Tensor, teacher_tail_N: Tensor
) -> Tensor:
    """KL(student || teacher) over a support S that does not know of y, and one bucket for its tail.

    y is in slot 0 and the rest last, as in every batch. `outside_N` (bool): y is in no list that S is made of, so it
    belongs to the tail; `teacher_tail_N`: the log of the teacher's mass outside S. With student p, teacher q and the
    masses P and Q of the tail, the value is sum_S p log(p / q) + P log(P / Q), a lower bound of the dense one that is
    the same for every y, and the gradient is that of this value and, where y is outside,

        log(p_y / q_y) grad log p_y  -  log(P / Q) grad log P .

    On average over y drawn from p the two are the dense gradient. That holds for draws at temperature 1 from the whole
    vocabulary, by the weights that learn from them. Raises ValueError where shapes differ.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    num_rows = len(student_logprobs_NB)
    for name, values_N in (("outside_N", outside_N), ("teacher_tail_N", teacher_tail_N)):
        if values_N.shape != (num_rows,):
            raise ValueError(f"{name} must have shape {(num_rows,)}, got {tuple(values_N.shape)}")
    sampled_N, rest_N = student_logprobs_NB[:, 0], student_logprobs_NB[:, -1]
    student_tail_N = torch.where(outside_N, torch.logaddexp(sampled_N, rest_N), rest_N)
    coarse_N = kl(
        _without_sampled(student_logprobs_NB, outside_N, student_tail_N),
        _without_sampled(teacher_logprobs_NB, outside_N, teacher_tail_N.to(teacher_logprobs_NB.dtype)),
    )
    no_tail_N = student_tail_N == -math.inf
    tail_ratio_N = (student_tail_N - teacher_tail_N).detach().masked_fill(no_tail_N, 0.0)
    sampled_ratio_N = (sampled_N - teacher_logprobs_NB[:, 0]).detach()
    residual_N = (sampled_ratio_N * sampled_N - tail_ratio_N * student_tail_N).where(outside_N, 0.0)
    return coarse_N + (residual_N - residual_N.detach())


def _without_sampled(logprobs_NB: Tensor, outside_N: Tensor, tail_N: Tensor) -> Tensor:
    """The buckets of S and its tail, [N, B]: slot 0 is empty where y is in the tail."""
    first_N1 = logprobs_NB[:, :1].masked_fill(outside_N[:, None], -math.inf)
    return torch.cat([first_N1, logprobs_NB[:, 1:-1], tail_N[:, None]], dim=1)
