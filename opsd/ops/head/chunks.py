"""One chunk of rows through the output head: logits -> bucket log-probabilities, and the gradient back.

The vocabulary goes by in blocks of columns, small enough for the processor's cache: a block's logits become shares of
the block at once, and wait so for the other blocks; then `logit_gradient` makes dL/dlogits of one block of shares after
the other. `opsd.ops.head.buffer` holds the shares, and `opsd.ops.head.gradients` takes the gradients to the head's
inputs.
"""
# N rows of a chunk, D width, C columns of a block, M blocks, P named tokens in a block, E stop ids, U support size,
# B = U + 1 buckets

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.ops.head.buffer import HeadBuffer, rows_in_gradient
from opsd.ops.head.events import Events
from opsd.ops.head.form import CapSlopes, HeadForm, OutputHead, cap_slopes
from opsd.ops.head.gradients import column_blocks, linear, product, softmax_dtype
from opsd.ops.head.plan import HeadPlan

BLOCK_COPIES = 3  # of blocks of logits, at one time, at most


class Block(NamedTuple):
    """Consecutive columns of the vocabulary, and which named tokens are among them."""

    columns: slice
    slot_P: Tensor  # int64, into support_NU.flatten(); none where the block is the whole vocabulary
    place_P: Tensor  # int64, into the block's [N, C], flat


class Chunk(NamedTuple):
    """The student's distribution on a chunk of rows."""

    logprobs_NB: Tensor  # float64
    blocks: list[Block]
    buffer: HeadBuffer | None  # has of each block the probabilities given its rest, 0 of a named one; None: not kept
    scale_NM: Tensor  # probability of each block given the whole rest; 0 where that is empty
    rest_entropy_N: Tensor | None  # of the tokens in the rest, given that it is one of them; None: not asked for
    stop_prob_NE: Tensor | None  # how the stop event's probability divides among the stop ids
    rest_tail_N: Tensor | None  # float64, what `temper` needs of the rest; None: no temperature
    form: HeadForm
    slopes: CapSlopes | None  # None: no soft cap, or shares that were not kept


def row_chunks(
    num_rows: int,
    weight_VD: Tensor,
    vocab_size: int,
    plan: HeadPlan,
    chunk_rows: int | None = None,
    *,
    num_shares: int = 1,
    block_copies: int = BLOCK_COPIES,
) -> list[slice]:
    """Splits the rows into chunks of `chunk_rows`. None: as large as there is room for.

    That is the plan's; where there are blocks of columns, the first chunk's shares may wait in the weight's gradient
    (see `HeadBuffer`), so of it only the blocks count. `num_shares`: numbers that wait per row and token;
    `block_copies`: of blocks of logits, at one time, at most.
    Raises ValueError where `chunk_rows` is less than 1.
    """
    if chunk_rows is not None:
        if chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
        return [slice(start, start + chunk_rows) for start in range(0, num_rows, chunk_rows)]
    most = most_first = max(1, plan.chunk_bytes // (4 * num_shares * vocab_size))
    if plan.block_columns is not None:
        in_gradient = rows_in_gradient(weight_VD, vocab_size) // num_shares if weight_VD.requires_grad else 0
        in_blocks = plan.chunk_bytes // (4 * block_copies * plan.block_columns)
        most_first = max(most, min(in_gradient, in_blocks))
    num_others = max(0, -(-(num_rows - most_first) // most))
    # All equally full: a small one at the end would cost as much time as a large one.
    others = -(-num_rows * most // (most_first + num_others * most))
    ends = [num_rows - others * left for left in reversed(range(num_others + 1))]
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends]) if start < end]


def chunk_buckets(
    hidden_ND: Tensor,
    head: OutputHead,
    events: Events,
    buffer: HeadBuffer | None,
    *,
    block_columns: int,
    with_entropy: bool = False,
) -> Chunk:
    """The buckets of a chunk, which begins in `buffer`: the Chunk is valid until the next one does.

    `buffer` None: the shares are not kept, only what becomes of them.

    The rest's log-probability comes from the logits of the rest themselves: log(1 - sum) would cancel.

    The buckets are few, so they are normalised in float64. Where the student is all but certain, the gradient is a
    small difference of large terms: in float32 its relative error was 3e-4 on peaked rows, so it is 1e-6.
    """
    dtype = softmax_dtype(hidden_ND)
    hidden_ND = hidden_ND.to(dtype)
    stop_NE, merged_N = stop_logits(hidden_ND, head, events)
    named_NU = torch.full(events.support_NU.shape, -math.inf, dtype=dtype, device=hidden_ND.device)
    blocks, logsumexp_N1s, entropy_N1s, untempered_N1s = _blocks(events, block_columns), [], [], []
    if buffer is not None:
        buffer.begin(len(hidden_ND))
    for columns, slot_P, place_P in blocks:
        logits_NC = _event_logits(hidden_ND, head, events, merged_N, columns)
        named_NU.view(-1)[slot_P] = logits_NC.view(-1)[place_P]
        logits_NC.view(-1)[place_P] = -math.inf  # out of the rest
        max_N1 = logits_NC.amax(1, keepdim=True)
        if events.temperature_N is not None:
            untempered_N1s.append(untempered_logsumexp(logits_NC, max_N1, events.temperature_N[:, None]))
        share_NC = torch.softmax(logits_NC, 1, out=logits_NC if buffer is None else buffer.put(columns))
        if max_N1.isneginf().any():  # a block that a row names from end to end
            share_NC.masked_fill_(max_N1.isneginf(), 0.0)
        # The largest share is exp(max - logsumexp); the bound matters where there is none.
        largest_N1 = share_NC.amax(1, keepdim=True).double().clamp_min_(torch.finfo(dtype).tiny)
        logsumexp_N1s.append(max_N1.double() - largest_N1.log())
        if with_entropy:
            entropy_N1s.append(torch.special.entr(share_NC).sum(1, keepdim=True))
        del logits_NC, share_NC  # the next block's take their place
    logsumexp_NM = torch.cat(logsumexp_N1s, dim=1)
    rest_N1 = logsumexp_NM.logsumexp(1, keepdim=True)
    scale_NM = (logsumexp_NM - rest_N1).exp().masked_fill_(rest_N1.isneginf(), 0.0).to(dtype)
    return Chunk(
        logprobs_NB=torch.cat([named_NU.double(), rest_N1], dim=1).log_softmax(1),
        blocks=blocks,
        buffer=buffer,
        scale_NM=scale_NM,
        rest_entropy_N=_rest_entropy(scale_NM, torch.cat(entropy_N1s, dim=1)) if with_entropy else None,
        stop_prob_NE=None if stop_NE is None else stop_NE.softmax(1),
        rest_tail_N=rest_tail(rest_N1, untempered_N1s, events.temperature_N),
        form=head.form,
        slopes=None if buffer is None else cap_slopes(head.form, events, named_NU, stop_NE, logsumexp_NM),
    )


def bucket_gradient(chunk: Chunk, grad_logprobs_NB: Tensor) -> Tensor:
    """dL/dlogits [N, B] of the buckets: what each bucket's tokens get together. In the dtype of the shares."""
    logprobs_NB = chunk.logprobs_NB.detach()
    # An impossible bucket (an empty slot, an empty rest) has no logit to move, whatever its gradient says.
    grad_NB = grad_logprobs_NB.masked_fill(logprobs_NB == -math.inf, 0.0)
    grad_NB = grad_NB - logprobs_NB.exp() * grad_NB.sum(1, keepdim=True)
    return grad_NB.to(chunk.scale_NM.dtype)


def logit_gradient(
    chunk: Chunk, events: Events, grad_NB: Tensor, grad_rest_entropy_N: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """The gradient in the head's products hidden @ weight.T, [N, C] of one block after another, from the first.

    Each is valid until the next one.
    """
    buffer, slopes = chunk.buffer, chunk.slopes
    assert buffer is not None, "the gradient of a chunk whose shares were not kept"
    grad_NB = chunk.form.scaled(grad_NB)
    if grad_rest_entropy_N is not None:
        grad_rest_entropy_N = chunk.form.scaled(grad_rest_entropy_N)

    def unnamed(share_NC: Tensor, scale_N1: Tensor) -> Tensor:
        out = gradient[: share_NC.numel()].view(share_NC.shape)
        if grad_rest_entropy_N is None:
            return torch.mul(share_NC, rest_N1 * scale_N1, out=out)
        assert chunk.rest_entropy_N is not None, "the gradient of an entropy that the chunk was not asked for"
        # d rest_entropy / dz_v = -r_v (log r_v + rest_entropy), with r the probability given the rest
        entropy_N1 = grad_rest_entropy_N[:, None]
        probs_NC = torch.mul(share_NC, scale_N1, out=out)
        entr_NC = torch.special.entr(probs_NC)
        return probs_NC.mul_(rest_N1 - entropy_N1 * chunk.rest_entropy_N[:, None]).addcmul_(entr_NC, entropy_N1)

    first = chunk.blocks[0].columns  # the largest
    gradient = chunk.scale_NM.new_empty(len(chunk.scale_NM) * (first.stop - first.start))
    rest_N1 = grad_NB[:, -1:]
    named_N, part_NE = named_gradient(chunk, grad_NB).flatten(), stop_parts(chunk)
    stop_N = None
    for block, (columns, slot_P, place_P) in enumerate(chunk.blocks):
        share_NC = buffer.take(columns)
        grad_NC = unnamed(share_NC, chunk.scale_NM[:, block, None])
        if slopes is not None:
            grad_NC.mul_(slopes.of_shares(share_NC, columns, block))
        grad_NC.view(-1).index_add_(0, place_P, named_N[slot_P])
        if part_NE is not None:
            for stop_id in inside(events.stop_ids, columns):
                column = stop_id - columns.start
                stop_N = grad_NC[:, column].clone() if stop_N is None else stop_N  # of the event, the lowest id's
                grad_NC[:, column] = stop_N * part_NE[:, events.stop_ids.index(stop_id)]
        yield columns, grad_NC if events.temperature_N is None else grad_NC.div_(events.temperature_N[:, None])


def named_gradient(chunk: Chunk, grad_NB: Tensor) -> Tensor:
    """Of each named token [N, U], from that of its bucket: by the cap's slope, where there is one."""
    named_NU = grad_NB[:, :-1]
    return named_NU if chunk.slopes is None else named_NU * chunk.slopes.named_NU


def stop_parts(chunk: Chunk) -> Tensor | None:
    """What each stop id [N, E] gets of the event's gradient: its share of the event, by its own slope; None: one id."""
    part_NE = chunk.stop_prob_NE
    if part_NE is None or chunk.slopes is None or chunk.slopes.stop_NE is None:
        return part_NE
    return part_NE * chunk.slopes.stop_NE


def untempered_logsumexp(logits_NC: Tensor, max_N1: Tensor, temperature_N1: Tensor) -> Tensor:
    """log sum_v exp(temperature * logit_v) [N, 1], float64: at temperature 1, of logits that are already divided."""
    shift_N1 = max_N1.masked_fill(max_N1 == -math.inf, 0.0)
    sum_N1 = (logits_NC - shift_N1).mul_(temperature_N1).exp_().sum(1, keepdim=True)
    return sum_N1.double().log() + temperature_N1.double() * shift_N1.double()


def rest_tail(rest_N1: Tensor, untempered_N1s: list[Tensor], temperature_N: Tensor | None) -> Tensor | None:
    """logsumexp of the rest at its temperature - (logsumexp at temperature 1) / temperature [N]; see `temper`.

    0 where the rest is empty, and exactly 0 at temperature 1.
    """
    if temperature_N is None:
        return None
    untempered_N = torch.cat(untempered_N1s, dim=1).logsumexp(1)
    tail_N = rest_N1[:, 0] - untempered_N / temperature_N.double()
    return tail_N.masked_fill((temperature_N == 1.0) | (rest_N1[:, 0] == -math.inf), 0.0)


def stop_logits(hidden_ND: Tensor, head: OutputHead, events: Events) -> tuple[Tensor | None, Tensor | None]:
    """The logits of the stop ids [N, E], and the event's at its temperature [N]; None where nothing is merged.

    They are one event before a temperature divides its logit, as they are in what is known of the teacher.
    """
    if len(events.stop_ids) < 2:
        return None, None
    columns = list(events.stop_ids)
    logits_NE = head.logits_(product(hidden_ND, head.weight_VD[columns].to(hidden_ND.dtype).T), columns)
    merged_N = logits_NE.logsumexp(1)
    return logits_NE, merged_N if events.temperature_N is None else merged_N / events.temperature_N


def _event_logits(
    hidden_ND: Tensor, head: OutputHead, events: Events, merged_N: Tensor | None, columns: slice
) -> Tensor:
    """The logits of a block [N, C] at their temperature: stop ids merged, -inf at ids that are no tokens."""
    logits_NC = head.logits_(linear(hidden_ND, head.weight_VD[columns].to(hidden_ND.dtype)), columns)
    if events.temperature_N is not None:
        logits_NC.div_(events.temperature_N[:, None])
    if merged_N is not None:
        for stop_id in inside(events.stop_ids, columns):
            logits_NC[:, stop_id - columns.start] = merged_N if stop_id == events.stop_ids[0] else -math.inf
    for foreign_id in inside(events.foreign_ids, columns):
        logits_NC[:, foreign_id - columns.start] = -math.inf
    return logits_NC


def _blocks(events: Events, block_columns: int) -> list[Block]:
    """The blocks of the vocabulary, each with its own named tokens: one sort finds those of all."""
    num_slots = events.support_NU.shape[1]
    id_S, slot_S = events.support_NU.flatten().sort()
    row_S = slot_S // max(1, num_slots)
    all_columns = column_blocks(events.vocab_size, block_columns)
    edges = torch.tensor([columns.start for columns in all_columns] + [events.vocab_size], device=id_S.device)
    bounds = itertools.pairwise(torch.searchsorted(id_S, edges).tolist())  # before the first are the empty slots
    blocks = []
    for columns, (first, end) in zip(all_columns, bounds, strict=True):
        place_P = row_S[first:end] * (columns.stop - columns.start) + id_S[first:end] - columns.start
        blocks.append(Block(columns, slot_S[first:end], place_P))
    return blocks


def _rest_entropy(scale_NM: Tensor, entropy_NM: Tensor) -> Tensor:
    """The entropy of the rest's tokens, given that it is one of them: that of the block, and that within it."""
    return (torch.special.entr(scale_NM) + scale_NM * entropy_NM).sum(1)


def inside(ids: tuple[int, ...], columns: slice) -> list[int]:
    return [i for i in ids if columns.start <= i < columns.stop]
