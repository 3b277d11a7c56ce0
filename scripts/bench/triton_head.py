"""The element-wise passes of the head's CUDA branch as two Triton kernels: a candidate, which no run uses.

`opsd.ops.head.whole_rows` makes the same from torch's operations. Over a chunk's logits [N, V], with U_n the tokens
that row n names, z the logits and G = dL/dlogits [N, B] of the buckets:

    forward     m_n = max_{v not in U_n} z_nv       s_n = sum_{v not in U_n} exp(z_nv - m_n)       rest = m_n + log s_n
    backward    dL/dz_nv = G_n,v for v in U_n,      G_n,rest exp(z_nv - m_n) / s_n for the others

torch makes a maximum, a softmax in place and a product by rows, each over the whole chunk. Here the forward pass reads
the logits once, as online softmax does (arXiv 1805.02867), and writes to none but the named tokens'; the backward pass
reads them once more and writes the gradient. Source: the gradient in `opsd.ops.head.loss`.

As in that branch: merged stop ids, foreign ids, empty slots, rows that name nothing or everything, values that are not
finite, a gradient in float32 (in the logits' place) or in bfloat16. Not handled: a temperature, a soft cap, the entropy
of the rest and its gradient. Untested on a GPU: run in Triton's interpreter, and compiled for three kinds of them.
scripts/gpu_check.sh checks and times it on one, and it goes into `opsd` only if it wins there.
"""
# N rows of a chunk, V vocabulary, E stop ids, U support size, B = U + 1 buckets

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsd.ops.head.events import Events
from opsd.ops.head.whole_rows import divide_stops, merge_stops

BLOCK = 4096  # columns that a program has at hand at one time; a power of 2
COLUMNS_PER_WARP = 512  # 16 per thread


class TritonRows(NamedTuple):
    """What the forward pass found, and the backward pass needs."""

    logprobs_NB: Tensor  # float64
    logits_NV: Tensor  # float32, of the rest: -inf at named tokens, foreign ids, and stop ids but the first
    max_N: Tensor  # float32, of the rest's logits; -inf where the rest is empty
    sum_N: Tensor  # float32, of exp(logit - max) over the rest; 0 where it is empty
    stop_prob_NE: Tensor | None  # how the stop event's probability divides among the stop ids; None: one id


def triton_buckets(logits_NV: Tensor, events: Events, *, block: int = BLOCK) -> TritonRows:
    """The log-probabilities of named tokens and rest, as `whole_rows.buckets_of_logits` makes them.

    `logits_NV`: [N, V] float32, contiguous, of tokens alone; they become those of the rest, in place.
    `events`: without a temperature; its support's ids are distinct within a row, -1 for an empty slot.
    Raises ValueError where the logits are of another kind, or there is a temperature.
    """
    require_plain(logits_NV, events)
    stop_NE = merge_stops(logits_NV, events.stop_ids)
    for foreign_id in events.foreign_ids:
        logits_NV[:, foreign_id].fill_(-math.inf)
    num_rows, num_slots = events.support_NU.shape
    named_NU = logits_NV.new_empty(num_rows, num_slots)
    max_N, sum_N = logits_NV.new_empty(num_rows), logits_NV.new_empty(num_rows)
    _take_named_and_reduce[num_rows,](
        logits_NV,
        events.support_NU.contiguous(),
        named_NU,
        max_N,
        sum_N,
        events.vocab_size,
        num_slots,
        SLOTS=triton.next_power_of_2(max(1, num_slots)),
        BLOCK=block,
        num_warps=num_warps(block),
    )
    rest_N1 = (max_N.double() + sum_N.double().log())[:, None]
    return TritonRows(
        logprobs_NB=torch.cat([named_NU.double(), rest_N1], dim=1).log_softmax(1),
        logits_NV=logits_NV,
        max_N=max_N,
        sum_N=sum_N,
        stop_prob_NE=None if stop_NE is None else stop_NE.softmax(1),
    )


def triton_gradient(
    rows: TritonRows, events: Events, grad_NB: Tensor, *, dtype: torch.dtype, block: int = BLOCK
) -> Tensor:
    """dL/dlogits [N, V] in `dtype`, as `whole_rows.whole_gradient` makes it; float32: in the place of the logits.

    `grad_NB`: [N, B] float32, of each bucket, see `opsd.ops.head.chunks.bucket_gradient`: 0 of one that is impossible.
    """
    num_rows, num_slots = events.support_NU.shape
    logits_NV = rows.logits_NV
    grad_NV = logits_NV if dtype == logits_NV.dtype else torch.empty_like(logits_NV, dtype=dtype)
    _gradient_of_rest_and_named[num_rows,](
        logits_NV,
        grad_NV,
        events.support_NU.contiguous(),
        grad_NB.contiguous(),
        rows.max_N,
        rows.sum_N,
        events.vocab_size,
        num_slots,
        SLOTS=triton.next_power_of_2(max(1, num_slots)),
        BLOCK=block,
        num_warps=num_warps(block),
    )
    divide_stops(grad_NV, events.stop_ids, rows.stop_prob_NE)
    return grad_NV


def require_plain(logits_NV: Tensor, events: Events) -> None:
    shape = (len(events.support_NU), events.vocab_size)
    if tuple(logits_NV.shape) != shape or logits_NV.dtype != torch.float32 or not logits_NV.is_contiguous():
        kind = f"{tuple(logits_NV.shape)} {logits_NV.dtype}, strides {logits_NV.stride()}"
        raise ValueError(f"logits_NV must be {shape} torch.float32, contiguous, got {kind}")
    if events.temperature_N is not None:
        raise ValueError("events.temperature_N must be None: these passes have no temperature")


def num_warps(block: int) -> int:
    return min(max(block // COLUMNS_PER_WARP, 1), 16)


# A program has a row. Its threads see each other's writes to it after a barrier only.


@triton.jit
def _shift(largest):
    return tl.where(largest == float("-inf"), 0.0, largest)  # inf - inf is not a number


@triton.jit
def _take_named_and_reduce(
    logits_ptr,
    support_ptr,
    named_ptr,
    max_ptr,
    sum_ptr,
    vocab_size,
    num_slots,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # rows * vocabulary may exceed 32 bits
    row_ptr = logits_ptr + row * vocab_size
    slot = tl.arange(0, SLOTS)
    is_slot = slot < num_slots
    named_id = tl.load(support_ptr + row * num_slots + slot, mask=is_slot, other=-1)
    is_named = named_id >= 0
    named = tl.load(row_ptr + named_id, mask=is_named, other=float("-inf"))
    tl.store(named_ptr + row * num_slots + slot, named, mask=is_slot)
    tl.debug_barrier()
    tl.store(row_ptr + named_id, float("-inf"), mask=is_named)
    tl.debug_barrier()
    # Of each lane on its own: in the loop no thread waits for another.
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab_size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(row_ptr + column, mask=column < vocab_size, other=float("-inf"))
        before = largest
        largest = tl.maximum(before, logit)
        shift = _shift(largest)
        total = total * tl.exp(before - shift) + tl.exp(logit - shift)
    row_largest = tl.max(largest, axis=0)
    tl.store(max_ptr + row, row_largest)
    tl.store(sum_ptr + row, tl.sum(total * tl.exp(largest - _shift(row_largest)), axis=0))


@triton.jit
def _gradient_of_rest_and_named(
    logits_ptr,
    grad_ptr,
    support_ptr,
    bucket_ptr,
    max_ptr,
    sum_ptr,
    vocab_size,
    num_slots,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    bucket_ptr += row * (num_slots + 1)
    shift = _shift(tl.load(max_ptr + row))
    total = tl.load(sum_ptr + row)
    # Only a zero, of an empty rest, is replaced: what is not a number must be seen.
    factor = tl.load(bucket_ptr + num_slots) / tl.where(total == 0.0, 1.0, total)
    for first in range(0, vocab_size, BLOCK):
        column = first + tl.arange(0, BLOCK)
        is_column = column < vocab_size
        logit = tl.load(logits_ptr + row * vocab_size + column, mask=is_column, other=float("-inf"))
        grad = tl.exp(logit - shift) * factor  # 0 of a named token
        tl.store(grad_ptr + row * vocab_size + column, grad.to(grad_ptr.dtype.element_ty), mask=is_column)
    tl.debug_barrier()
    slot = tl.arange(0, SLOTS)
    is_slot = slot < num_slots
    named_id = tl.load(support_ptr + row * num_slots + slot, mask=is_slot, other=-1)
    named = tl.load(bucket_ptr + slot, mask=is_slot, other=0.0)
    tl.store(grad_ptr + row * vocab_size + named_id, named.to(grad_ptr.dtype.element_ty), mask=named_id >= 0)
