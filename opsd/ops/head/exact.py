"""Hidden rows of student and teacher x both output heads -> the divergence over the whole vocabulary.

The counterpart of `opsd.ops.head.loss` for a teacher whose hidden states are known: no support and no rest, so no bias,
and no tensor of size [rows, vocabulary] either. It goes through the rows in chunks, each of which `opsd.ops.head.pair`
takes from logits to gradients. No logits are computed twice: the three products of the student's head and the one of
the teacher's are all that any exact way needs.
"""
# N rows, D width of the student, E of the teacher, V rows of the student's head, W of the teacher's

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.ops.head.chunks import row_chunks
from opsd.ops.head.events import Events, events_of, expect_shape
from opsd.ops.head.form import PLAIN, HeadForm, OutputHead
from opsd.ops.head.gradients import HeadGradients, column_blocks, softmax_dtype
from opsd.ops.head.loss import HeadLoss, is_learning, require_head, threshold_for
from opsd.ops.head.pair import ModelRows, Pair, add_terms, finish, logit_gradient, normalise
from opsd.ops.head.plan import HeadPlan, plan_for
from opsd.ops.head.terms import terms_of
from opsd.ops.losses.objective import Objective
from opsd.ops.row_function import name_of

# Where the plan has no blocks: the terms of a divergence need many copies of one, the products are large enough.
BLOCK_COLUMNS = 16384
BLOCK_COPIES = 12  # of a block's logits, at one time, at most: those that a divergence and its gradient are made of


def exact_head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    teacher_hidden_NE: Tensor,
    teacher_weight_WE: Tensor,
    weight_N: Tensor,
    divergence: Callable[..., Tensor] | Objective,
    *,
    chunk_rows: int | None = None,
    temperature_N: Tensor | None = None,
    vocab_size: int | None = None,
    stop_ids: tuple[int, ...] = (),
    foreign_ids: tuple[int, ...] = (),
    row_inputs: dict[str, Tensor] | None = None,
    plan: HeadPlan | None = None,
    filter_threshold: float | None = None,
    bias_V: Tensor | None = None,
    form: HeadForm = PLAIN,
    teacher_bias_W: Tensor | None = None,
    teacher_form: HeadForm = PLAIN,
) -> tuple[Tensor, Tensor]:
    """sum_n weight_n * divergence(student_n, teacher_n) over all tokens, in nats, with its gradient in the same pass.

    student = softmax(hidden @ weight.T), teacher = softmax(teacher_hidden @ teacher_weight.T), after the last norm of
    each; `bias_V` and `form`, and those of the teacher, say what else their heads do, see `HeadForm`.
    Returns the loss [] and the unweighted divergence of each row [N], detached, in float32 (float64 where the student's
    inputs are). The loss is differentiable once, in `hidden_ND`, `weight_VD` and `bias_V`; the teacher is a constant.
    N = 0 gives loss 0 and zero gradients.
    `divergence`: a `Loss` that is a sum over tokens (`by_token`), such as an entry of DIVERGENCES, or an `Objective` of
    such losses. `row_inputs`: tensors [N, ...] that it takes as keyword arguments, those of the rows at hand.
    `temperature_N`: > 0, divides both models' logits (of the stop event, once merged).
    `vocab_size`: ids that the models share, from 0 on; further rows of either head are padding, no tokens. None: all
    rows, of which both heads then have as many.
    `stop_ids`: one event in both models; `foreign_ids`: no tokens in either.
    `chunk_rows`, `plan` and `filter_threshold` are those of `sparse_head_loss`.
    Raises ValueError where a shape, `chunk_rows`, `vocab_size`, `stop_ids` or the threshold does not fit, and, by name,
    for losses that are no sums over tokens. Source: docs/methods.md, The exact divergence.
    """
    plan = plan_for(hidden_ND) if plan is None else plan
    objective = sums_over_tokens(divergence)
    num_rows = len(hidden_ND)
    expect_shape("teacher_hidden_NE", teacher_hidden_NE, (num_rows, teacher_hidden_NE.shape[-1]))
    expect_shape("teacher_weight_WE", teacher_weight_WE, (len(teacher_weight_WE), teacher_hidden_NE.shape[-1]))
    expect_shape("weight_N", weight_N, (num_rows,))
    vocab_size = _shared_vocabulary(vocab_size, len(weight_VD), len(teacher_weight_WE))
    support_N0 = torch.empty(num_rows, 0, dtype=torch.int64, device=hidden_ND.device)
    events = events_of(hidden_ND, weight_VD, support_N0, temperature_N, vocab_size, stop_ids, foreign_ids, plan)
    require_head(weight_VD, bias_V, form)
    require_head(teacher_weight_WE, teacher_bias_W, teacher_form)
    sizes = {"num_shares": 2, "block_copies": BLOCK_COPIES}
    job = _ExactJob(
        events=events,
        chunks=row_chunks(num_rows, weight_VD, vocab_size, plan, chunk_rows, **sizes),
        teacher_hidden_NE=teacher_hidden_NE.detach(),
        teacher_head=OutputHead(
            teacher_weight_WE.detach(), None if teacher_bias_W is None else teacher_bias_W.detach(), teacher_form
        ),
        form=form,
        weight_N=weight_N.detach(),
        objective=objective,
        needs_grad=(is_learning(hidden_ND), is_learning(weight_VD), is_learning(bias_V)),
        filter_threshold=threshold_for(filter_threshold, weight_VD.dtype, plan),
        row_inputs=row_inputs or {},
        plan=plan,
    )
    return HeadLoss.apply(hidden_ND, weight_VD, bias_V, job)


def sums_over_tokens(divergence: Callable[..., Tensor] | Objective) -> Objective:
    """The objective, all of whose parts are sums over tokens. Raises ValueError that names those which are not."""
    objective = Objective.of(divergence)
    others = [f"{loss.setting} ({name_of(loss)})" for _, loss in objective.parts if not loss.by_token]
    if others:
        raise ValueError(
            f"over the whole vocabulary a loss must be a sum over tokens, and say so as Loss(function, by_token=True); "
            f"this one is not: {', '.join(others)}"
        )
    return objective


class _ExactJob(NamedTuple):
    """What `exact_head_loss` computes on the rows, apart from the tensors that it is differentiable in."""

    events: Events
    chunks: list[slice]
    teacher_hidden_NE: Tensor
    teacher_head: OutputHead
    form: HeadForm  # of the student's
    weight_N: Tensor
    objective: Objective
    needs_grad: tuple[bool, bool, bool]  # of hidden, weight and bias
    filter_threshold: float
    row_inputs: dict[str, Tensor]
    plan: HeadPlan

    def run(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The divergence of each row [N], and the gradients of the loss."""
        per_token_N = hidden_ND.new_empty(len(hidden_ND), dtype=softmax_dtype(hidden_ND))
        vocab_size = self.events.vocab_size
        gradients = HeadGradients(
            hidden_ND,
            weight_VD,
            self.needs_grad[:2],
            self.plan,
            vocab_size=vocab_size,
            filter_threshold=self.filter_threshold,
            bias_V=bias_V if self.needs_grad[2] else None,
        )
        blocks = column_blocks(vocab_size, self.plan.block_columns or BLOCK_COLUMNS)
        teacher_dtype = self.teacher_hidden_NE.dtype
        if self.plan.block_columns is not None:
            teacher_dtype = softmax_dtype(self.teacher_hidden_NE)
        for rows in self.chunks:
            events = self.events.of(rows)
            student = ModelRows(hidden_ND[rows].to(gradients.factor_dtype), OutputHead(weight_VD, bias_V, self.form))
            teacher = ModelRows(self.teacher_hidden_NE[rows].to(teacher_dtype), self.teacher_head)
            pair = normalise(student, teacher, events, gradients.buffer, blocks)
            own = {name: values[rows] for name, values in self.row_inputs.items()}
            terms = terms_of(self.objective, own, _row_values(pair, self.objective, vocab_size))
            value_N, slopes = add_terms(pair, terms, self.weight_N[rows] if any(self.needs_grad) else None)
            per_token_N[rows] = value_N.to(per_token_N.dtype)
            if slopes is None:
                gradients.buffer.drop()
            else:
                row_sum_N1 = finish(pair, slopes, events)
                gradients.add(rows, logit_gradient(pair), row_sum_N1)
        return per_token_N, (*gradients.results(), gradients.bias_result())


def _row_values(pair: Pair, objective: Objective, vocab_size: int) -> list[dict[str, Tensor]]:
    """What each part needs of whole rows, a few rows at a time: they take no more memory than a block does."""
    if not any(loss.row_values for _, loss in objective.parts):
        return [{} for _ in objective.parts]
    num_rows, first = len(pair.likeliest_N1s[0]), pair.blocks[0]
    few = max(1, num_rows * (first.stop - first.start) // vocab_size)
    found: list[dict[str, list[Tensor]]] = [{name: [] for name in loss.row_values} for _, loss in objective.parts]
    for start in range(0, num_rows, few):
        student_RV, teacher_RV = pair.whole_rows(slice(start, min(start + few, num_rows)))
        for (_, loss), values_of in zip(objective.parts, found, strict=True):
            for name, values_R in loss.of_whole_rows(student_RV, teacher_RV).items():
                values_of[name].append(values_R)
    return [{name: torch.cat(values) for name, values in values_of.items()} for values_of in found]


def _shared_vocabulary(given: int | None, student_rows: int, teacher_rows: int) -> int:
    if given is None and student_rows != teacher_rows:
        raise ValueError(
            f"the heads have {student_rows} and {teacher_rows} rows: give vocab_size, how many ids the models share"
        )
    vocab_size = student_rows if given is None else given
    if vocab_size > teacher_rows:
        raise ValueError(f"vocab_size must be in 1..{teacher_rows}, the rows of the teacher's head, got {vocab_size}")
    return vocab_size
