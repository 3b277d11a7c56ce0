"""Hidden rows x output head -> bucket log-probabilities, without a tensor of size [rows, vocabulary].

A bucket is one named token, or (the last) all tokens without a name. Everything that is learnt here is a function of
the bucket log-probabilities, so the closed form of one backward serves every divergence. With G_b = dL/dlogprob_b:

    dL/dz_v = G_v [v named] + G_rest (p_v / P_rest) [v not named] - p_v sum_b G_b

in the logits z; `opsd.ops.head.form` says how a model makes those. Source: docs/methods.md, The sparse divergence.

`bucket_logprobs` is that primitive. `sparse_head_loss` is what training uses: it has the divergence at hand, so it
forms the gradients in the same pass and computes no logits twice. Both go through the rows in chunks, each of which
`opsd.ops.head.chunks` takes from logits to gradients.
"""
# N rows, D width, V vocabulary, U support size, B = U + 1 buckets

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.ops.head.chunks import Chunk, bucket_gradient, chunk_buckets, logit_gradient, row_chunks
from opsd.ops.head.events import Events, events_of, expect_shape
from opsd.ops.head.form import PLAIN, HeadForm, OutputHead, require_form
from opsd.ops.head.gradients import HeadGradients, softmax_dtype
from opsd.ops.head.plan import HeadPlan, plan_for
from opsd.ops.head.whole_rows import whole_buckets, whole_gradient
from opsd.ops.temperature import temper

FILTER_THRESHOLD = {torch.float64: 0.0, torch.float32: 1e-7}
# Of bfloat16. Cut-cross-entropy's 2^-12 is below the rounding of one entry, but thousands of such entries add up in the
# gradient of a hidden row to many times the rounding of the whole.
FILTER_THRESHOLD_16_BIT = 2.0**-20


def bucket_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    support_NU: Tensor,
    *,
    chunk_rows: int | None = None,
    temperature_N: Tensor | None = None,
    vocab_size: int | None = None,
    stop_ids: tuple[int, ...] = (),
    foreign_ids: tuple[int, ...] = (),
    bias_V: Tensor | None = None,
    form: HeadForm = PLAIN,
    plan: HeadPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the named tokens and of the rest, and the entropy, of softmax(hidden @ weight.T).

    Returns logprobs [N, U + 1] (the rest last) and entropy [N] of the whole distribution, both in nats, in float32
    (float64 for float64 inputs) and differentiable once in `hidden_ND`, `weight_VD` and `bias_V`; backward computes the
    logits of a chunk anew.
    `support_NU`: int64; a row's ids are distinct; -1 marks an empty slot, whose log-probability is -inf. What the ids
    are is checked on the CPU only: to look would make the host wait for a GPU.
    The rest is -inf where the support names every token.
    `chunk_rows`: rows whose logits exist at one time; None: see `opsd.ops.head.chunks.row_chunks`.
    `temperature_N`: > 0, divides the logits of its row (of the stop event, once merged).
    `vocab_size`: rows of the head from there on are padding, no tokens.
    `stop_ids`: one event, named by the first of them; the support must name it by that id.
    `foreign_ids`: rows of the head that are no tokens either; the support must not name them.
    `bias_V`, `form`: the logits are form.soft_cap's cap of form.scale * (hidden @ weight.T + bias), before all of this.
    `plan`: sizes and order of the work; None: that of the device, see `opsd.ops.head.plan`.
    Raises ValueError where a shape, `chunk_rows`, `vocab_size`, `stop_ids`, `form` or (on the CPU) an id of the support
    does not fit. Source: docs/methods.md, The sparse divergence.
    """
    plan = plan_for(hidden_ND) if plan is None else plan
    events = events_of(hidden_ND, weight_VD, support_NU, temperature_N, vocab_size, stop_ids, foreign_ids, plan)
    require_head(weight_VD, bias_V, form)
    chunks = row_chunks(len(hidden_ND), weight_VD, events.vocab_size, plan, chunk_rows)
    logprobs_NB, rest_entropy_N = _BucketLogprobs.apply(hidden_ND, weight_VD, bias_V, form, events, chunks, plan)
    probs_NB = logprobs_NB.exp()
    entropy_of_buckets_N = -(probs_NB * logprobs_NB.masked_fill(logprobs_NB == -math.inf, 0.0)).sum(1)
    return logprobs_NB, entropy_of_buckets_N + probs_NB[:, -1] * rest_entropy_N


def sparse_head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    support_NU: Tensor,
    teacher_logprobs_NB: Tensor,
    weight_N: Tensor,
    divergence: Callable[..., Tensor],
    *,
    chunk_rows: int | None = None,
    temperature_N: Tensor | None = None,
    vocab_size: int | None = None,
    stop_ids: tuple[int, ...] = (),
    foreign_ids: tuple[int, ...] = (),
    bias_V: Tensor | None = None,
    form: HeadForm = PLAIN,
    filter_threshold: float | None = None,
    row_inputs: dict[str, Tensor] | None = None,
    plan: HeadPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_n weight_n * divergence(student_n, teacher_n) over the buckets, in nats, with its gradient in the same pass.

    `divergence` maps student (float64) and teacher log-probabilities [N, B] to [N], row by row. The other arguments are
    those of `bucket_logprobs`, in particular `support_NU`, on which the teacher's log-probabilities stand, those of
    temperature 1: `temperature_N` divides the student's logits and tempers the teacher with them, see `temper`.
    Returns the loss [] and the unweighted divergence of each row [N], detached. The loss is differentiable once, in
    `hidden_ND`, `weight_VD` and `bias_V`: the forward pass forms the gradients that are needed, so that no logits are
    computed twice, and backward only scales them. (A second backward, of a retained graph, does compute them again.)
    N = 0 gives loss 0 and zero gradients.
    `row_inputs`: tensors [N, ...] that `divergence` takes as keyword arguments, those of the rows at hand.

    `filter_threshold` t: of a chunk, the vocabulary columns in which every row has |dL/dz_v| <= t sum_u |dL/dz_u| are
    left out of the gradients of hidden and weight (never of the loss or of the bias's gradient). None: FILTER_THRESHOLD
    of the dtype, off on CUDA; 0: off. Under a `form` the z_v on the left is the product with its bias, the sum on the
    right, here and below, that over logits times |scale|: no less than the products', as a cap's slope is at most 1.
    With M columns left out:
        grad_hidden of a row errs by at most t M max_v |weight_v| sum_u |dL/dz_u|,
        grad_weight of a column left out by at most t sum_n |hidden_n| sum_u |dL/dz_nu|, of any other not at all.
    An unnamed token has dL/dz_v = c p_v, c = G_rest / P_rest - sum_b G_b: the first error is also at most
    |c| (the probability left out) max_v |weight_v|.
    Raises ValueError as `bucket_logprobs` does, and for a negative threshold.
    """
    plan = plan_for(hidden_ND) if plan is None else plan
    events = events_of(hidden_ND, weight_VD, support_NU, temperature_N, vocab_size, stop_ids, foreign_ids, plan)
    require_head(weight_VD, bias_V, form)
    num_rows, num_slots = support_NU.shape
    expect_shape("teacher_logprobs_NB", teacher_logprobs_NB, (num_rows, num_slots + 1))
    expect_shape("weight_N", weight_N, (num_rows,))
    chunks = row_chunks(num_rows, weight_VD, events.vocab_size, plan, chunk_rows)
    job = _LossJob(
        events=events,
        chunks=chunks,
        teacher_logprobs_NB=teacher_logprobs_NB.detach(),
        weight_N=weight_N.detach(),
        divergence=divergence,
        needs_grad=(is_learning(hidden_ND), is_learning(weight_VD), is_learning(bias_V)),
        form=form,
        filter_threshold=threshold_for(filter_threshold, weight_VD.dtype, plan),
        row_inputs=row_inputs or {},
        plan=plan,
    )
    return HeadLoss.apply(hidden_ND, weight_VD, bias_V, job)


class _BucketLogprobs(torch.autograd.Function):
    """Bucket log-probabilities [N, B], and the entropy [N] of the tokens in the rest, given that it is one of them."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, form, events, chunks, plan):
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        ctx.form, ctx.events, ctx.chunks, ctx.plan = form, events, chunks, plan
        ctx.set_materialize_grads(False)
        num_rows, num_slots = events.support_NU.shape
        logprobs_NB = hidden_ND.new_empty(num_rows, num_slots + 1, dtype=softmax_dtype(hidden_ND))
        rest_entropy_N = hidden_ND.new_empty(num_rows, dtype=softmax_dtype(hidden_ND))
        buckets_of, _ = _passes(plan, hidden_ND.dtype)
        head = OutputHead(weight_VD, bias_V, form)
        for rows in chunks:
            chunk = buckets_of(hidden_ND[rows], head, events.of(rows), None, with_entropy=True)
            logprobs_NB[rows] = chunk.logprobs_NB
            rest_entropy_N[rows] = chunk.rest_entropy_N
        return logprobs_NB, rest_entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs_NB, grad_rest_entropy_N):
        if grad_logprobs_NB is None:  # then the entropy has no gradient either: it is partly made of them
            return (None,) * 7
        hidden_ND, weight_VD, bias_V = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gradients = HeadGradients(
            hidden_ND,
            weight_VD,
            (needs_hidden, needs_weight),
            ctx.plan,
            vocab_size=ctx.events.vocab_size,
            bias_V=bias_V if needs_bias else None,
        )
        buckets_of, gradient_of = _passes(ctx.plan, hidden_ND.dtype)
        head = OutputHead(weight_VD, bias_V, ctx.form)
        for rows in ctx.chunks:
            events = ctx.events.of(rows)
            chunk = buckets_of(hidden_ND[rows], head, events, gradients.buffer, with_entropy=True)
            grad_rest_entropy = None if grad_rest_entropy_N is None else grad_rest_entropy_N[rows]
            grad_NB = bucket_gradient(chunk, grad_logprobs_NB[rows])
            gradients.add(rows, gradient_of(chunk, events, grad_NB, grad_rest_entropy))
        return *gradients.results(), gradients.bias_result(), None, None, None, None


class _LossJob(NamedTuple):
    """What `sparse_head_loss` computes on the rows, apart from the tensors that it is differentiable in."""

    events: Events
    chunks: list[slice]
    teacher_logprobs_NB: Tensor
    weight_N: Tensor
    divergence: Callable[..., Tensor]
    needs_grad: tuple[bool, bool, bool]  # of hidden, weight and bias
    form: HeadForm
    filter_threshold: float
    row_inputs: dict[str, Tensor]
    plan: HeadPlan

    def run(
        self, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The divergence of each row [N], and the gradients of the loss."""
        per_token_N = hidden_ND.new_empty(len(hidden_ND), dtype=softmax_dtype(hidden_ND))
        gradients = HeadGradients(
            hidden_ND,
            weight_VD,
            self.needs_grad[:2],
            self.plan,
            vocab_size=self.events.vocab_size,
            filter_threshold=self.filter_threshold,
            bias_V=bias_V if self.needs_grad[2] else None,
        )
        buckets_of, gradient_of = _passes(self.plan, hidden_ND.dtype)
        head, needs_grad = OutputHead(weight_VD, bias_V, self.form), any(self.needs_grad)
        for rows in self.chunks:
            events = self.events.of(rows)
            chunk = buckets_of(hidden_ND[rows], head, events, gradients.buffer if needs_grad else None)
            with torch.set_grad_enabled(needs_grad):
                logprobs_NB = chunk.logprobs_NB.requires_grad_(needs_grad)
                own = {name: values[rows] for name, values in self.row_inputs.items()}
                teacher_NB = self.teacher_logprobs_NB[rows]
                if events.temperature_N is not None:
                    assert chunk.rest_tail_N is not None, "a chunk with a temperature has no tail"
                    teacher_NB = temper(teacher_NB, events.temperature_N, chunk.rest_tail_N)
                value_N = self.divergence(logprobs_NB, teacher_NB, **own)
            per_token_N[rows] = value_N.detach()
            if needs_grad:
                (grad_NB,) = torch.autograd.grad(value_N, logprobs_NB, self.weight_N[rows].to(value_N.dtype))
                grad_NB = bucket_gradient(chunk, grad_NB)
                row_sum_N1 = self.form.scaled(grad_NB).abs().sum(1, keepdim=True)  # one sign within a bucket
                if events.temperature_N is not None:
                    row_sum_N1.div_(events.temperature_N[:, None])
                gradients.add(rows, gradient_of(chunk, events, grad_NB, None), row_sum_N1)
        return per_token_N, (*gradients.results(), gradients.bias_result())


class HeadLoss(torch.autograd.Function):
    """The loss, and of each row the divergence; the gradients wait in ctx for the scalar that scales them.

    `job.run(hidden_ND, weight_VD, bias_V)` returns the divergences [N] and the gradients of the three; `job.weight_N`
    are the weights.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, job):
        per_token_N, ctx.gradients = job.run(hidden_ND, weight_VD, bias_V)
        ctx.job = job
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V)
        ctx.mark_non_differentiable(per_token_N)
        return (job.weight_N * per_token_N).sum(), per_token_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _grad_per_token_N):
        # The first backward scales the gradients in place and gives them away: a copy would be the largest tensor here.
        # A further one, of a retained graph, computes them anew.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = ctx.job.run(*ctx.saved_tensors)
        # On the CPU it costs nothing to see that there is nothing to scale, as in loss.backward().
        if grad_loss.device.type != "cpu" or grad_loss != 1.0:
            gradients = tuple(None if g is None else g.mul_(grad_loss) for g in gradients)
        return *gradients, None


def is_learning(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def require_head(weight_VD: Tensor, bias_V: Tensor | None, form: HeadForm) -> None:
    if bias_V is not None:
        expect_shape("bias_V", bias_V, (len(weight_VD),))
    require_form(form)


def _passes(plan: HeadPlan, dtype: torch.dtype) -> tuple[Callable[..., Chunk], Callable[..., Iterator]]:
    """A chunk's way to the buckets and back; `dtype`: of the head's inputs."""
    if plan.block_columns is None:
        return whole_buckets, partial(whole_gradient, dtype=dtype)
    return partial(chunk_buckets, block_columns=plan.block_columns), logit_gradient


def threshold_for(given: float | None, dtype: torch.dtype, plan: HeadPlan) -> float:
    default = FILTER_THRESHOLD.get(dtype, FILTER_THRESHOLD_16_BIT) if plan.may_look else 0.0
    threshold = default if given is None else given
    if not threshold >= 0.0:
        raise ValueError(f"filter_threshold must be at least 0, got {given}")
    return threshold
