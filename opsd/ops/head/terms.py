"""The terms of a divergence on columns of all tokens' log-probabilities, and what each token adds to the gradient.

Every function here maps log-probabilities [N, C] of student and teacher to the part [N] that these columns have in the
rows' values. With weights [N] it also writes: the student's probabilities in the place of the student's
log-probabilities, and G = weight * d value / d logprob in that of the teacher's. To each row of G may be added any
multiple of the probabilities: dL/dz_v = G_v - p_v sum_u G_u stays what it is.

`by_autograd` serves every objective. `CLOSED` has a tenth of its operations, for the two divergences that most runs
use; the tests hold them together.
"""
# N rows of a chunk, C columns of a block

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from opsd.ops.losses.divergences import forward_kl, reverse_kl
from opsd.ops.losses.objective import Objective

Terms = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Stands for minus infinity where a column is no event: the difference of two is 0 and not nan.
NO_EVENT = -1e30
# exp takes ten times as long where it underflows. What is raised to this changes no sum by a millionth of its rounding.
LEAST_EXPONENT = -80.0


def exp_(exponents: Tensor) -> Tensor:
    return exponents.clamp_(min=LEAST_EXPONENT).exp_()


def terms_of(objective: Objective, row_inputs: dict[str, Tensor], row_values: list[dict[str, Tensor]]) -> Terms:
    """Those of the objective on a chunk whose inputs and values of whole rows these are."""
    weight, loss = objective.parts[0]
    if len(objective.parts) == 1 and weight == 1.0:
        # Without options, as these two have none, a bound function is the function itself.
        closed = CLOSED.get(getattr(loss.function, "func", loss.function))
        if closed is not None:
            return closed
    return partial(by_autograd, partial(objective.on_columns, row_inputs=row_inputs, row_values=row_values))


def by_autograd(
    value_of: Callable[[Tensor, Tensor], Tensor], student_NC: Tensor, teacher_NC: Tensor, weight_N: Tensor | None
) -> Tensor:
    if weight_N is None:
        return value_of(student_NC, teacher_NC)
    with torch.enable_grad():
        leaf_NC = student_NC.detach().requires_grad_()
        value_N = value_of(leaf_NC, teacher_NC)
    (grad_NC,) = torch.autograd.grad(value_N, leaf_NC, weight_N.to(value_N.dtype))
    teacher_NC.copy_(grad_NC)
    exp_(student_NC)
    return value_N.detach()


def reverse_kl_terms(student_NC: Tensor, teacher_NC: Tensor, weight_N: Tensor | None) -> Tensor:
    """p (log p - log q), which is also G: its derivative has p more."""
    if weight_N is None:
        return reverse_kl(student_NC, teacher_NC)
    terms_NC = torch.sub(student_NC, teacher_NC, out=teacher_NC).mul_(exp_(student_NC))
    value_N = terms_NC.sum(1)
    terms_NC.mul_(weight_N[:, None])
    return value_N


def forward_kl_terms(student_NC: Tensor, teacher_NC: Tensor, weight_N: Tensor | None) -> Tensor:
    """q (log q - log p), and G = -q."""
    if weight_N is None:
        return forward_kl(student_NC, teacher_NC)
    probs_NC = exp_(teacher_NC.clone())
    value_N = teacher_NC.sub_(student_NC).mul_(probs_NC).sum(1)
    torch.mul(probs_NC, -weight_N[:, None], out=teacher_NC)
    exp_(student_NC)
    return value_N


CLOSED: dict[Callable[..., Tensor], Terms] = {reverse_kl: reverse_kl_terms, forward_kl: forward_kl_terms}
