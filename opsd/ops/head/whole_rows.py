"""A chunk of rows through the output head, the whole vocabulary at once: for a device that computes beside the host.

The counterpart of `opsd.ops.head.chunks` for CUDA: the same Chunk and the same gradient from few, large kernels, and no
operation that makes the host wait for a value. The shares take the place of the logits, and the gradient in float32
that of the shares. Tested on the CPU; not run on a GPU.
"""
# N rows of a chunk, D width, V vocabulary, E stop ids, U support size, B = U + 1 buckets

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from opsd.ops.head.buffer import HeadBuffer
from opsd.ops.head.chunks import Block, Chunk, named_gradient, rest_tail, stop_parts, untempered_logsumexp
from opsd.ops.head.events import Events
from opsd.ops.head.form import HeadForm, OutputHead, cap_slopes
from opsd.ops.head.gradients import column_blocks, product

SUM_COLUMNS = 16384  # what is summed over the vocabulary by way of a copy, so many columns at a time


def whole_buckets(
    hidden_ND: Tensor, head: OutputHead, events: Events, buffer: HeadBuffer | None, *, with_entropy: bool = False
) -> Chunk:
    """`chunk_buckets` with one block, whose slots and places nobody needs."""
    columns, out_NV = slice(0, events.vocab_size), None
    if buffer is not None:
        buffer.begin(len(hidden_ND))
        out_NV = buffer.put(columns)
    logits_NV = head.logits_(product(hidden_ND, head.weight_VD[columns].T, out=out_NV), columns)
    return buckets_of_logits(logits_NV, head.form, events, buffer, with_entropy=with_entropy)


def buckets_of_logits(
    logits_NV: Tensor, form: HeadForm, events: Events, buffer: HeadBuffer | None, *, with_entropy: bool = False
) -> Chunk:
    """`whole_buckets` from the logits on, which the shares replace: in `buffer`'s memory, where there is one."""
    dtype, vocab_size = logits_NV.dtype, events.vocab_size
    stop_NE = merge_stops(logits_NV, events.stop_ids)
    if events.temperature_N is not None:
        logits_NV.div_(events.temperature_N[:, None])
    for foreign_id in events.foreign_ids:
        logits_NV[:, foreign_id].fill_(-math.inf)
    named_NU = _take_named(logits_NV, events.support_NU)
    max_N1, likeliest_N1 = logits_NV.max(1, keepdim=True)
    untempered_N1s = []
    if events.temperature_N is not None:
        for logits_NC in logits_NV.split(SUM_COLUMNS, dim=1):
            max_of_part_N1 = logits_NC.amax(1, keepdim=True)
            untempered_N1s.append(untempered_logsumexp(logits_NC, max_of_part_N1, events.temperature_N[:, None]))
    share_NV = torch.softmax(logits_NV, 1, out=logits_NV)
    num_events = vocab_size - len(events.foreign_ids) - max(0, len(events.stop_ids) - 1)
    if events.support_NU.shape[1] >= num_events:  # a row may name every token
        share_NV.masked_fill_(max_N1 == -math.inf, 0.0)
    largest_N1 = share_NV.gather(1, likeliest_N1).double().clamp_min_(torch.finfo(dtype).tiny)
    rest_N1 = max_N1.double() - largest_N1.log()
    nothing = events.support_NU.new_empty(0)
    return Chunk(
        logprobs_NB=torch.cat([named_NU.double(), rest_N1], dim=1).log_softmax(1),
        blocks=[Block(slice(0, vocab_size), nothing, nothing)],
        buffer=buffer,
        scale_NM=torch.ones_like(rest_N1, dtype=dtype).masked_fill_(rest_N1 == -math.inf, 0.0),
        rest_entropy_N=_row_sums(torch.special.entr, share_NV) if with_entropy else None,
        stop_prob_NE=None if stop_NE is None else stop_NE.softmax(1),
        rest_tail_N=rest_tail(rest_N1, untempered_N1s, events.temperature_N),
        form=form,
        slopes=None if buffer is None else cap_slopes(form, events, named_NU, stop_NE, rest_N1),
    )


def whole_gradient(
    chunk: Chunk, events: Events, grad_NB: Tensor, grad_rest_entropy_N: Tensor | None, *, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """`logit_gradient` with one block, in `dtype`: that of the products."""
    assert chunk.buffer is not None, "the gradient of a chunk whose shares were not kept"
    columns = slice(0, events.vocab_size)
    share_NV = chunk.buffer.take(columns)
    grad_NB = chunk.form.scaled(grad_NB)
    if events.temperature_N is not None:
        grad_NB = grad_NB / events.temperature_N[:, None]
    if grad_rest_entropy_N is not None:
        grad_rest_entropy_N = chunk.form.scaled(grad_rest_entropy_N)
        if events.temperature_N is not None:
            grad_rest_entropy_N = grad_rest_entropy_N / events.temperature_N
    rest_N1 = _rest_gradient(chunk, share_NV, grad_NB[:, -1:], grad_rest_entropy_N)
    grad_NV = share_NV if dtype == share_NV.dtype else torch.empty_like(share_NV, dtype=dtype)
    torch.mul(share_NV, rest_N1, out=grad_NV)
    if events.support_NU.shape[1] > 0:
        id_NU, _ = _filled(events.support_NU)
        grad_NV.scatter_add_(1, id_NU, named_gradient(chunk, grad_NB).to(dtype))  # 0 of an empty slot
    divide_stops(grad_NV, events.stop_ids, stop_parts(chunk))
    yield columns, grad_NV


def _rest_gradient(chunk: Chunk, share_NV: Tensor, rest_N1: Tensor, grad_rest_entropy_N: Tensor | None) -> Tensor:
    """Changes the shares in place so that what is returned, [N, 1], times them is the gradient of the rest's tokens."""
    if chunk.slopes is None and grad_rest_entropy_N is None:
        return rest_N1
    for columns in column_blocks(share_NV.shape[1], SUM_COLUMNS):
        share_NC = share_NV[:, columns]
        slope_NC = None if chunk.slopes is None else chunk.slopes.of_shares(share_NC, columns, 0)
        if grad_rest_entropy_N is not None:
            assert chunk.rest_entropy_N is not None, "the gradient of an entropy that the chunk was not asked for"
            # As in `logit_gradient`; the logarithm is finite where it counts, as 0 log 0 is 0.
            entropy_N1 = grad_rest_entropy_N[:, None]
            entr_NC = torch.special.entr(share_NC)
            share_NC.mul_(rest_N1 - entropy_N1 * chunk.rest_entropy_N[:, None]).addcmul_(entr_NC, entropy_N1)
        if slope_NC is not None:
            share_NC.mul_(slope_NC)
    return rest_N1 if grad_rest_entropy_N is None else chunk.scale_NM


def merge_stops(logits_NV: Tensor, stop_ids: tuple[int, ...]) -> Tensor | None:
    """Moves the stop event's logit to the first stop id's column; all stop ids' [N, E], None for fewer than two."""
    if len(stop_ids) < 2:
        return None
    stop_NE = torch.stack([logits_NV[:, stop_id] for stop_id in stop_ids], dim=1)
    for stop_id in stop_ids[1:]:
        logits_NV[:, stop_id].fill_(-math.inf)
    logits_NV[:, stop_ids[0]].copy_(stop_NE.logsumexp(1))
    return stop_NE


def divide_stops(grad_NV: Tensor, stop_ids: tuple[int, ...], part_NE: Tensor | None) -> None:
    """Gives each stop id its part of the event's gradient, which is in the first stop id's column. None: one id."""
    if part_NE is None:
        return
    stop_N = grad_NV[:, stop_ids[0]].clone()
    for column, stop_id in enumerate(stop_ids):
        grad_NV[:, stop_id].copy_(stop_N * part_NE[:, column])


def _take_named(logits_NV: Tensor, support_NU: Tensor) -> Tensor:
    """The logits of the named tokens [N, U], -inf in an empty slot; they are -inf in `logits_NV` from then on."""
    if support_NU.shape[1] == 0:
        return logits_NV[:, :0]
    id_NU, is_named_N1 = _filled(support_NU)
    named_NU = logits_NV.gather(1, id_NU)
    logits_NV.scatter_(1, id_NU, named_NU.masked_fill(is_named_N1, -math.inf))
    return named_NU.masked_fill(support_NU < 0, -math.inf)


def _filled(support_NU: Tensor) -> tuple[Tensor, Tensor]:
    """The ids with one that the row names in its empty slots (0 where it names none), and whether it names any [N, 1].

    To drop the empty slots the host would have to wait for their number.
    """
    largest_N1 = support_NU.amax(1, keepdim=True)
    return support_NU.where(support_NU >= 0, largest_N1.clamp_min(0)), largest_N1 >= 0


def _row_sums(function: Callable[[Tensor], Tensor], values_NV: Tensor) -> Tensor:
    return torch.stack([function(part_NC).sum(1) for part_NC in values_NV.split(SUM_COLUMNS, dim=1)]).sum(0)
