"""One chunk of rows through the output head: logits -> bucket log-probabilities, and the gradient back.

All of it happens inside one buffer [rows, vocabulary], the logits: `chunk_buckets` turns them into shares of the rest,
`logit_gradient` turns the shares into dL/dlogits. `opsd.ops.head_gradients` takes those to the head's inputs.
"""
# N rows of a chunk, D width, V vocabulary, E stop ids, U support size, B = U + 1 buckets

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.ops.head_gradients import column_blocks, softmax_dtype, write_product


class Events(NamedTuple):
    """What the columns of the head stand for, and at which temperature."""

    support_NU: Tensor
    temperature_N: Tensor | None
    vocab_size: int
    stop_E: Tensor | None  # None: nothing to merge

    def of(self, rows: slice) -> Events:
        temperature_N = None if self.temperature_N is None else self.temperature_N[rows]
        return self._replace(support_NU=self.support_NU[rows], temperature_N=temperature_N)


class Chunk(NamedTuple):
    """The student's distribution on a chunk of rows."""

    logprobs_NB: Tensor  # float64
    share_NV: Tensor  # exp(z_v - max over the rest) of a token of the rest, 0 of a named one; the one big buffer
    share_sum_N1: Tensor  # at least 1, or 0 where the rest is empty
    stop_prob_NE: Tensor | None  # how the stop event's probability divides among the stop ids


def logits_buffer(hidden_ND: Tensor, chunks: list[slice], events: Events) -> Tensor:
    """Room for the logits of one chunk, [rows of the largest, V]: one for all of them, as fresh pages cost time."""
    num_rows = max((len(range(*rows.indices(len(hidden_ND)))) for rows in chunks), default=0)
    return hidden_ND.new_empty(num_rows, events.vocab_size, dtype=softmax_dtype(hidden_ND))


def chunk_buckets(hidden_ND: Tensor, weight_VD: Tensor, events: Events, buffer_RV: Tensor) -> Chunk:
    """The buckets of a chunk, whose logits are written to `buffer_RV` (R >= N): the Chunk is valid until the next one.

    The rest's log-probability comes from the logits of the rest themselves: log(1 - sum) would cancel.

    The buckets are few, so they are normalised in float64. Where the student is all but certain, the gradient is a
    small difference of large terms: in float32 its relative error was 3e-4 on peaked rows, so it is 1e-6.
    """
    logits_NV = buffer_RV[: len(hidden_ND)]
    for columns in column_blocks(events.vocab_size):  # of bfloat16 logits too, only a block exists beside the buffer
        write_product(logits_NV[:, columns], hidden_ND, weight_VD[columns].T)
    if events.temperature_N is not None:
        logits_NV.div_(events.temperature_N[:, None])
    stop_prob_NE = None if events.stop_E is None else _merge_stops(logits_NV, events.stop_E)
    empty_NU, id_NU = events.support_NU < 0, events.support_NU.clamp_min(0)
    named_NU = logits_NV.gather(1, id_NU).masked_fill_(empty_NU, -math.inf)
    # Adding -inf removes the named tokens; an empty slot adds 0 to token 0, where writing could overwrite it.
    logits_NV.scatter_add_(1, id_NU, torch.full_like(named_NU, -math.inf).masked_fill_(empty_NU, 0.0))
    # The bound keeps -inf - max at -inf where the rest is empty.
    max_N1 = logits_NV.amax(1, keepdim=True).clamp_min_(torch.finfo(logits_NV.dtype).min)
    share_NV = logits_NV.sub_(max_N1).exp_()
    share_sum_N1 = share_NV.sum(1, keepdim=True)
    rest_N1 = share_sum_N1.double().log() + max_N1
    logprobs_NB = torch.cat([named_NU.double(), rest_N1], dim=1).log_softmax(1)
    return Chunk(logprobs_NB, share_NV, share_sum_N1, stop_prob_NE)


def bucket_gradient(chunk: Chunk, grad_logprobs_NB: Tensor) -> Tensor:
    """dL/dlogits [N, B] of the buckets: what each bucket's tokens get together. In the dtype of the logits."""
    logprobs_NB = chunk.logprobs_NB.detach()
    # An impossible bucket (an empty slot, an empty rest) has no logit to move, whatever its gradient says.
    grad_NB = grad_logprobs_NB.masked_fill(logprobs_NB == -math.inf, 0.0)
    grad_NB = grad_NB - logprobs_NB.exp() * grad_NB.sum(1, keepdim=True)
    return grad_NB.to(chunk.share_NV.dtype)


def logit_gradient(chunk: Chunk, events: Events, grad_NB: Tensor, grad_rest_entropy_N: Tensor | None) -> Tensor:
    """dL/dlogits [N, V] of the plain head, before temperature and merging; written over `chunk.share_NV`."""
    grad_NV, divisor_N1 = chunk.share_NV, chunk.share_sum_N1.clamp_min(1.0)
    rest_N1 = grad_NB[:, -1:] / divisor_N1
    if grad_rest_entropy_N is None:
        grad_NV.mul_(rest_N1)
    else:
        # d rest_entropy / dz_v = -r_v (log r_v + rest_entropy), with r = share / share_sum
        entr_NV = torch.special.entr(grad_NV)
        entropy_N1 = grad_rest_entropy_N[:, None] / divisor_N1
        mean_N1 = entr_NV.sum(1, keepdim=True) / divisor_N1
        grad_NV.mul_(rest_N1 - entropy_N1 * mean_N1).addcmul_(entr_NV, entropy_N1)
    grad_NV.scatter_add_(1, events.support_NU.clamp_min(0), grad_NB[:, :-1])  # an empty slot adds 0
    if events.stop_E is not None:
        grad_NV.index_copy_(1, events.stop_E, grad_NV.index_select(1, events.stop_E[:1]) * chunk.stop_prob_NE)
    return grad_NV if events.temperature_N is None else grad_NV.div_(events.temperature_N[:, None])


def rest_entropy(chunk: Chunk) -> Tensor:
    sum_N = chunk.share_sum_N1[:, 0].clamp_min(1.0)
    return sum_N.log() + torch.special.entr(chunk.share_NV).sum(1) / sum_N


def _merge_stops(logits_NV: Tensor, stop_E: Tensor) -> Tensor:
    """Moves the stop ids' whole mass to the first of them, in place; returns how it was divided, [N, E]."""
    stop_logits_NE = logits_NV.index_select(1, stop_E)
    merged_NE = torch.full_like(stop_logits_NE, -math.inf)
    merged_NE[:, 0] = stop_logits_NE.logsumexp(1)
    logits_NV.index_copy_(1, stop_E, merged_NE)
    return stop_logits_NE.softmax(1)
