"""From a scored batch and what is kept of it to balanced, padding-free micro-batches."""
# N kept tokens, U support size, B = U + 1 buckets, L tokens of a packed row, S sequences in it

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsd.batch import ScoredBatch
from opsd.errors import StageError
from opsd.ops.align import TokenRows, predicting_rows, sampled_outside, support_buckets
from opsd.ops.losses.objective import RESIDUAL_INPUTS, ROLLOUT_LOGPROB
from opsd.types import Mixture, Selection, Vocabulary


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences packed into one row without padding, each cut after its last kept row; positions restart with each."""

    token_ids_L: Tensor  # int64 [L]
    position_L: Tensor  # int64 [L]
    cu_seq_lens: Tensor  # int32 [S + 1]: 0, then where each sequence ends in the row
    max_length: int  # tokens of the longest sequence; a Python int, so that no layer has to ask a GPU for it
    row_N: Tensor  # int64 [N], ascending, into the packed row: whose hidden state predicts a kept token
    support_NU: Tensor  # int64 [N, U] event ids; -1 marks an empty slot
    teacher_logprobs_NB: Tensor  # float32 [N, U + 1], the rest bucket last; -inf in an empty slot
    weight_N: Tensor  # float32 [N], already divided by the global batch's sum of weights
    index_N: Tensor  # int64 [N], into the global batch's tokens
    temperature_N: Tensor | None = None  # float32 [N]
    other_ids_L: Tensor | None = None  # int64 [L], see Mixture; None: nothing is mixed
    own_share_L: Tensor | None = None  # float32 [L]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # [N] each, see Selection; and what the loss asked for
    # [N, E] float32 or bfloat16, the teacher's last hidden states; None: its log-probabilities are all that is known
    teacher_hidden_NE: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved, inputs={name: value.to(device) for name, value in self.inputs.items()})


def pack(
    scored: ScoredBatch,
    selection: Selection,
    support: str,
    vocabulary: Vocabulary,
    *,
    num_ranks: int,
    max_tokens: int,
    with_hidden: bool = False,
    asked: Collection[str] = (),
) -> list[list[MicroBatch]]:
    """Micro-batches for each rank: equal in number over ranks, near equal in tokens, at most max_tokens each.

    A sequence longer than max_tokens gets a micro-batch of its own, so with max_tokens 0 each does. A rank without a
    sequence gets a micro-batch without rows, because every rank must take part in every collective.
    `asked`: what the loss takes; of PACKED_INPUTS the batches get it here.
    """
    whole = pack_whole(scored, selection, support, vocabulary, asked=asked)
    if with_hidden:
        whole = replace(whole, teacher_hidden_NE=kept_hidden(scored, selection.index_N.numpy()))
    lengths = whole.cu_seq_lens.diff().tolist()
    by_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for sequence in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        rank = load.index(min(load))
        by_rank[rank].append(sequence)
        load[rank] += lengths[sequence]
    groups = [_fill(sequences, lengths, max_tokens) for sequences in by_rank]
    num_micro_batches = max(1, max(map(len, groups)))
    empty = _no_rows(whole)
    return [[_part(whole, g[i]) if i < len(g) else empty for i in range(num_micro_batches)] for g in groups]


def pack_whole(
    scored: ScoredBatch,
    selection: Selection,
    support: str,
    vocabulary: Vocabulary,
    *,
    asked: Collection[str] = (),
) -> MicroBatch:
    """Every rollout that keeps a token, in one row; weights are divided by the selection's denominator.

    A sequence ends at the last row that predicts a kept token: what follows cannot change the loss.
    """
    index_N = selection.index_N.numpy()
    first_R = np.searchsorted(index_N, scored.bounds)  # place in index_N of each rollout's first kept token, and N
    token_ids, rows, mixtures, lengths = [], [], [], []
    num_tokens = 0
    for number, rollout in enumerate(scored.rollouts):
        kept_N = index_N[first_R[number] : first_R[number + 1]] - scored.bounds[number]
        if len(kept_N) == 0:
            continue
        row_N = predicting_rows(len(rollout.prompt.token_ids), kept_N)
        rows.append(row_N + num_tokens)
        lengths.append(int(row_N[-1]) + 1)
        num_tokens += lengths[-1]
        token_ids.append(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])[: lengths[-1]])
        mixtures.append(rollout.mixture)
    denominator = selection.weight_N.sum() if selection.denominator is None else selection.denominator
    support_NU, teacher_NB = kept_buckets(scored, index_N, support, vocabulary)
    return MicroBatch(
        token_ids_L=torch.from_numpy(np.concatenate(token_ids).astype(np.int64)),
        position_L=torch.cat([torch.arange(length) for length in lengths]),
        cu_seq_lens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        max_length=max(lengths),
        row_N=torch.from_numpy(np.concatenate(rows)),
        support_NU=torch.from_numpy(support_NU),
        teacher_logprobs_NB=torch.from_numpy(teacher_NB),
        weight_N=selection.weight_N / denominator,
        index_N=selection.index_N,
        temperature_N=selection.temperature_N,
        inputs={**selection.inputs, **_inputs_of_draws(scored, index_N, support, vocabulary, asked)},
        **_mixed(mixtures, token_ids),
    )


def kept_buckets(
    scored: ScoredBatch, index_N: np.ndarray, support: str, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """`support_buckets` of the tokens at `index_N`, ascending places in the batch: [N, U] and [N, U + 1]."""
    parts = [support_buckets(rows, support, vocabulary) for rows in _kept_rows(scored, index_N, vocabulary)]
    ids, logprobs = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(logprobs)


def kept_hidden(scored: ScoredBatch, index_N: np.ndarray) -> Tensor:
    """The teacher's hidden states [N, E] of the tokens at `index_N`, ascending places in the batch."""
    first_R = np.searchsorted(index_N, scored.bounds)
    parts = []
    for number, item in enumerate(scored.items):
        assert item.scores.hidden is not None, "loss.payload=hidden asks every engine for them"
        kept_N = index_N[first_R[number] : first_R[number + 1]] - scored.bounds[number]
        parts.append(item.scores.hidden[kept_N])
    hidden_NE = torch.from_numpy(np.concatenate(parts))
    return hidden_NE.view(torch.bfloat16) if hidden_NE.dtype == torch.uint16 else hidden_NE


def _inputs_of_draws(
    scored: ScoredBatch, index_N: np.ndarray, support: str, vocabulary: Vocabulary, asked: Collection[str]
) -> dict[str, Tensor]:
    """What is `asked` of the tokens at `index_N` as draws of the student: RESIDUAL_INPUTS and ROLLOUT_LOGPROB.

    Raises StageError where an answer is no draw of the student.
    """
    settings = {"loss.residual=true": RESIDUAL_INPUTS, "loss.importance_cap": {ROLLOUT_LOGPROB}}
    for setting in (name for name, inputs in settings.items() if not inputs.isdisjoint(asked)):
        for rollout in scored.rollouts:
            if rollout.policy_version < 0 or rollout.mixture is not None:
                raise StageError(
                    f"learn: {setting} learns from the student's own answers alone, and one to prompt "
                    f"{rollout.prompt.index} is not its own"
                )
    found: dict[str, Tensor] = {}
    if not RESIDUAL_INPUTS.isdisjoint(asked):
        parts = [sampled_outside(rows, support, vocabulary) for rows in _kept_rows(scored, index_N, vocabulary)]
        outside, tails = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
        found.update(outside_N=outside, teacher_tail_N=tails)
    if ROLLOUT_LOGPROB in asked:
        logprobs_T = np.concatenate([rollout.sampled_logprobs for rollout in scored.rollouts])
        found[ROLLOUT_LOGPROB] = torch.from_numpy(logprobs_T[index_N])
    return found


def _kept_rows(scored: ScoredBatch, index_N: np.ndarray, vocabulary: Vocabulary) -> Iterator[TokenRows]:
    """The tokens at `index_N`, a group of rollouts at a time."""
    start = 0
    for rows in TokenRows.in_groups(scored.items, vocabulary):
        first, last = np.searchsorted(index_N, [start, start + len(rows)])
        yield rows.take(index_N[first:last] - start)
        start += len(rows)


def _mixed(mixtures: list[Mixture | None], token_ids: list[np.ndarray]) -> dict[str, Any]:
    """The other sequences, cut as their own ones are; a rollout without one is mixed with itself."""
    if all(mixture is None for mixture in mixtures):
        return {}
    pairs = [
        (mixture or Mixture(other_ids=ids, own_share=1.0), len(ids))
        for mixture, ids in zip(mixtures, token_ids, strict=True)
    ]
    other_ids = [mixture.other_ids[:length].astype(np.int64) for mixture, length in pairs]
    own_share = [np.full(length, mixture.own_share, np.float32) for mixture, length in pairs]
    return {
        "other_ids_L": torch.from_numpy(np.concatenate(other_ids)),
        "own_share_L": torch.from_numpy(np.concatenate(own_share)),
    }


def _fill(sequences: list[int], lengths: list[int], max_tokens: int) -> list[list[int]]:
    """First fit, longest first."""
    groups: list[list[int]] = []
    free: list[int] = []
    for sequence in sequences:
        size = lengths[sequence]
        slot = next((i for i, room in enumerate(free) if size <= room), None)
        if slot is None:
            groups.append([sequence])
            free.append(max_tokens - size)
        else:
            groups[slot].append(sequence)
            free[slot] -= size
    return groups


def _part(whole: MicroBatch, sequences: Sequence[int]) -> MicroBatch:
    """These sequences of a packed row, in this order, as a row of their own."""
    ends = whole.cu_seq_lens.long()
    row_ends = torch.searchsorted(whole.row_N, ends)
    token_L, place_N = (
        torch.cat([torch.arange(int(bounds[s]), int(bounds[s + 1])) for s in sequences]) for bounds in (ends, row_ends)
    )
    lengths = ends.diff()[list(sequences)]
    starts = torch.cat([ends[:1], lengths.cumsum(0)])  # from 0
    moved_N = torch.repeat_interleave(starts[:-1] - ends[list(sequences)], row_ends.diff()[list(sequences)])
    part = replace(
        whole,
        token_ids_L=whole.token_ids_L[token_L],
        position_L=whole.position_L[token_L],
        cu_seq_lens=starts.int(),
        max_length=int(lengths.max()),
        **_rows(whole, place_N),
    )
    part = replace(part, row_N=part.row_N + moved_N)
    if whole.other_ids_L is None or whole.own_share_L is None:
        return part
    own_share_L = whole.own_share_L[token_L]
    if (own_share_L == 1.0).all():  # nothing is mixed in this part
        return replace(part, other_ids_L=None, own_share_L=None)
    return replace(part, other_ids_L=whole.other_ids_L[token_L], own_share_L=own_share_L)


def _no_rows(whole: MicroBatch) -> MicroBatch:
    """One token to run the trunk on, and no kept row."""
    return replace(
        whole,
        token_ids_L=whole.token_ids_L[:1],
        position_L=whole.position_L[:1],
        cu_seq_lens=torch.tensor([0, 1], dtype=torch.int32),
        max_length=1,
        other_ids_L=None,
        own_share_L=None,
        **_rows(whole, torch.arange(0)),
    )


def _rows(batch: MicroBatch, place_M: Tensor) -> dict[str, Any]:
    """What a batch has of each kept token, of those at these places."""
    return {
        "row_N": batch.row_N[place_M],
        "support_NU": batch.support_NU[place_M],
        "teacher_logprobs_NB": batch.teacher_logprobs_NB[place_M],
        "weight_N": batch.weight_N[place_M],
        "index_N": batch.index_N[place_M],
        "temperature_N": None if batch.temperature_N is None else batch.temperature_N[place_M],
        "inputs": {name: values[place_M] for name, values in batch.inputs.items()},
        "teacher_hidden_NE": None if batch.teacher_hidden_NE is None else batch.teacher_hidden_NE[place_M],
    }
