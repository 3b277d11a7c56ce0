"""One chunk of rows through the output head: logits -> bucket log-probabilities, and the gradient back.

The vocabulary goes by in blocks of columns, small enough for the processor's cache: a block's logits become shares of
the block at once, and wait so in the one big buffer; `logit_gradient` turns block after block of shares into
dL/dlogits. `opsd.ops.head_gradients` takes those to the head's inputs.
"""
# N rows of a chunk, D width, C columns of a block, M blocks, E stop ids, U support size, B = U + 1 buckets

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from opsd.ops.head_gradients import column_blocks, linear, softmax_dtype


class Events(NamedTuple):
    """What the columns of the head stand for, and at which temperature."""

    support_NU: Tensor
    temperature_N: Tensor | None
    vocab_size: int
    stop_ids: tuple[int, ...]  # one event, named by the first; fewer than two: nothing to merge

    def of(self, rows: slice) -> Events:
        temperature_N = None if self.temperature_N is None else self.temperature_N[rows]
        return self._replace(support_NU=self.support_NU[rows], temperature_N=temperature_N)


class Chunk(NamedTuple):
    """The student's distribution on a chunk of rows."""

    logprobs_NB: Tensor  # float64
    shares: list[tuple[slice, Tensor]]  # columns, probability [N, C] of each given the block's rest; 0 of a named one
    scale_NM: Tensor  # probability of each block given the whole rest; 0 where that is empty
    rest_entropy_N: Tensor | None  # of the tokens in the rest, given that it is one of them; None: not asked for
    stop_prob_NE: Tensor | None  # how the stop event's probability divides among the stop ids


def shares_buffer(hidden_ND: Tensor, chunks: list[slice], vocab_size: int) -> Tensor:
    """Room for the shares of the largest chunk: one for all of them, as fresh pages cost time."""
    num_rows = max((len(range(*rows.indices(len(hidden_ND)))) for rows in chunks), default=0)
    return hidden_ND.new_empty(num_rows * vocab_size, dtype=softmax_dtype(hidden_ND))


def chunk_buckets(
    hidden_ND: Tensor, weight_VD: Tensor, events: Events, buffer: Tensor | None, *, with_entropy: bool = False
) -> Chunk:
    """The buckets of a chunk, whose shares are written to `buffer`: the Chunk is valid until the next one.

    `buffer` None: the shares are not kept, only what becomes of them.

    The rest's log-probability comes from the logits of the rest themselves: log(1 - sum) would cancel.

    The buckets are few, so they are normalised in float64. Where the student is all but certain, the gradient is a
    small difference of large terms: in float32 its relative error was 3e-4 on peaked rows, so it is 1e-6.
    """
    dtype = softmax_dtype(hidden_ND)
    merged_N, stop_prob_NE = _merged_stops(hidden_ND, weight_VD, events)
    named_NU = torch.full(events.support_NU.shape, -math.inf, dtype=dtype, device=hidden_ND.device)
    shares, logsumexp_N1s, entropy_N1s = [], [], []
    for columns in column_blocks(events.vocab_size, hidden_ND.device):
        logits_NC = linear(hidden_ND, weight_VD[columns]).to(dtype)
        if events.temperature_N is not None:
            logits_NC.div_(events.temperature_N[:, None])
        for stop_id in _inside(events.stop_ids, columns):
            logits_NC[:, stop_id - columns.start] = merged_N if stop_id == events.stop_ids[0] else -math.inf
        named_NU = _take_named(logits_NC, named_NU, events.support_NU - columns.start)
        max_N1 = logits_NC.amax(1, keepdim=True)
        share_NC = torch.softmax(logits_NC, 1, out=_room(buffer, logits_NC, columns))
        if max_N1.isneginf().any():  # a block that a row names from end to end
            share_NC.masked_fill_(max_N1.isneginf(), 0.0)
        # The largest share is exp(max - logsumexp); the bound matters where there is none.
        largest_N1 = share_NC.amax(1, keepdim=True).double().clamp_min_(torch.finfo(dtype).tiny)
        logsumexp_N1s.append(max_N1.double() - largest_N1.log())
        if with_entropy:
            entropy_N1s.append(torch.special.entr(share_NC).sum(1, keepdim=True))
        if buffer is not None:
            shares.append((columns, share_NC))
    logsumexp_NM = torch.cat(logsumexp_N1s, dim=1)
    rest_N1 = logsumexp_NM.logsumexp(1, keepdim=True)
    scale_NM = (logsumexp_NM - rest_N1).exp().masked_fill_(rest_N1.isneginf(), 0.0).to(dtype)
    return Chunk(
        logprobs_NB=torch.cat([named_NU.double(), rest_N1], dim=1).log_softmax(1),
        shares=shares,
        scale_NM=scale_NM,
        rest_entropy_N=_rest_entropy(scale_NM, torch.cat(entropy_N1s, dim=1)) if with_entropy else None,
        stop_prob_NE=stop_prob_NE,
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
    """dL/dlogits of the plain head, before temperature and merging, [N, C] of one block after another.

    Each is written over the block's shares.
    """
    rest_N1 = grad_NB[:, -1:]
    stop_N = None
    blocks = zip(chunk.shares, chunk.scale_NM.split(1, dim=1), strict=True)
    # The block with the stop event's name comes first: the other stop ids get their parts of its gradient.
    for (columns, grad_NC), scale_N1 in sorted(blocks, key=lambda block: not _names_stop(events, block[0][0])):
        if grad_rest_entropy_N is None:
            grad_NC.mul_(rest_N1 * scale_N1)
        else:  # d rest_entropy / dz_v = -r_v (log r_v + rest_entropy), with r the probability given the rest
            entropy_N1 = grad_rest_entropy_N[:, None]
            entr_NC = torch.special.entr(grad_NC.mul_(scale_N1))
            grad_NC.mul_(rest_N1 - entropy_N1 * chunk.rest_entropy_N[:, None]).addcmul_(entr_NC, entropy_N1)
        at_NU, inside_NU = _places(events.support_NU - columns.start, grad_NC.shape[1])
        grad_NC.scatter_add_(1, at_NU, grad_NB[:, :-1].where(inside_NU, 0.0))
        for stop_id in _inside(events.stop_ids, columns):
            column = stop_id - columns.start
            stop_N = grad_NC[:, column].clone() if stop_N is None else stop_N
            grad_NC[:, column] = stop_N * chunk.stop_prob_NE[:, events.stop_ids.index(stop_id)]
        yield columns, grad_NC if events.temperature_N is None else grad_NC.div_(events.temperature_N[:, None])


def _room(buffer: Tensor | None, logits_NC: Tensor, columns: slice) -> Tensor:
    """Where the block's shares go: to their place in the buffer, else over the logits."""
    if buffer is None:
        return logits_NC
    num_rows = len(logits_NC)
    return buffer[num_rows * columns.start : num_rows * columns.stop].view(num_rows, -1)


def _merged_stops(hidden_ND: Tensor, weight_VD: Tensor, events: Events) -> tuple[Tensor | None, Tensor | None]:
    """The stop event's logit [N], and how its probability divides among the stop ids [N, E]."""
    if len(events.stop_ids) < 2:
        return None, None
    logits_NE = (hidden_ND @ weight_VD[list(events.stop_ids)].T).to(softmax_dtype(hidden_ND))
    if events.temperature_N is not None:
        logits_NE.div_(events.temperature_N[:, None])
    return logits_NE.logsumexp(1), logits_NE.softmax(1)


def _take_named(logits_NC: Tensor, named_NU: Tensor, local_NU: Tensor) -> Tensor:
    """`named_NU` with the logits that this block has of them; in the block they become -inf, out of the rest."""
    at_NU, inside_NU = _places(local_NU, logits_NC.shape[1])
    named_NU = logits_NC.gather(1, at_NU).where(inside_NU, named_NU)
    # Adding -inf removes a named token; a slot of another block adds 0 where writing could overwrite.
    logits_NC.scatter_add_(1, at_NU, torch.zeros_like(named_NU).masked_fill_(inside_NU, -math.inf))
    return named_NU


def _places(local_NU: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """(columns that may be read, whether they are meant): another block's ids and empty slots are not."""
    at_NU = local_NU.clamp(0, num_columns - 1)
    return at_NU, at_NU == local_NU


def _rest_entropy(scale_NM: Tensor, entropy_NM: Tensor) -> Tensor:
    """Of the rest's tokens, given that it is one of them: that of the block, and that within it."""
    return (torch.special.entr(scale_NM) + scale_NM * entropy_NM).sum(1)


def _names_stop(events: Events, columns: slice) -> bool:
    return len(events.stop_ids) > 0 and columns.start <= events.stop_ids[0] < columns.stop


def _inside(ids: tuple[int, ...], columns: slice) -> list[int]:
    return [i for i in ids if columns.start <= i < columns.stop] if len(ids) > 1 else []
