"""From kept tokens to balanced, padding-free micro-batches."""
# N kept tokens, U support size, L tokens of a packed micro-batch

from __future__ import annotations

import numpy as np
import torch

from opsd.ops.align import predicting_rows, support_buckets
from opsd.types import MicroBatch, ScoredRollout, Selection, TrainSequence, Vocabulary


def build_sequences(
    scored: list[ScoredRollout], selection: Selection, support: str, vocabulary: Vocabulary
) -> list[TrainSequence]:
    """One TrainSequence for each rollout that keeps a token, weights divided by the sum over the global batch.

    A sequence ends at the last row that predicts a kept token: what follows cannot change the loss.
    """
    index_N = selection.index_N.numpy()
    weight_N = (selection.weight_N / selection.weight_N.sum()).numpy()
    ends = np.cumsum([len(item.rollout) for item in scored])
    bounds = np.searchsorted(index_N, np.concatenate([[0], ends]))
    sequences = []
    for item, start, stop, end in zip(scored, bounds[:-1], bounds[1:], ends, strict=True):
        if start == stop:
            continue
        kept_N = index_N[start:stop] - (end - len(item.rollout))
        support_TU, teacher_TB = support_buckets(item.rollout, item.scores, support, vocabulary)
        prompt_ids = item.rollout.prompt.token_ids
        row_N = predicting_rows(len(prompt_ids), kept_N)
        token_ids = np.concatenate([prompt_ids, item.rollout.response_ids])[: row_N[-1] + 1]
        sequences.append(
            TrainSequence(
                token_ids=token_ids,
                row_N=row_N,
                support_NU=support_TU[kept_N],
                teacher_logprobs_NB=teacher_TB[kept_N],
                weight_N=weight_N[start:stop],
                index_N=index_N[start:stop],
            )
        )
    return sequences


def pack(sequences: list[TrainSequence], num_ranks: int, max_tokens: int) -> list[list[MicroBatch]]:
    """Micro-batches for each rank: equal in number over ranks, near equal in tokens, at most max_tokens each.

    A sequence longer than max_tokens gets a micro-batch of its own. A rank without a sequence gets an empty
    micro-batch, because every rank must take part in every collective.
    """
    by_rank: list[list[TrainSequence]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for sequence in sorted(sequences, key=lambda s: -len(s.token_ids)):
        rank = load.index(min(load))
        by_rank[rank].append(sequence)
        load[rank] += len(sequence.token_ids)
    groups = [_fill(rank_sequences, max_tokens) for rank_sequences in by_rank]
    num_micro_batches = max(1, max(len(g) for g in groups))
    num_columns = max((s.support_NU.shape[1] for s in sequences), default=0)
    return [[_concatenate(g[i] if i < len(g) else [], num_columns) for i in range(num_micro_batches)] for g in groups]


def _fill(sequences: list[TrainSequence], max_tokens: int) -> list[list[TrainSequence]]:
    """First fit, longest first."""
    groups: list[list[TrainSequence]] = []
    free: list[int] = []
    for sequence in sequences:
        size = len(sequence.token_ids)
        slot = next((i for i, room in enumerate(free) if size <= room), None)
        if slot is None:
            groups.append([sequence])
            free.append(max_tokens - size)
        else:
            groups[slot].append(sequence)
            free[slot] -= size
    return groups


def _concatenate(sequences: list[TrainSequence], num_columns: int) -> MicroBatch:
    if not sequences:
        return MicroBatch(
            token_ids_L=torch.zeros(1, dtype=torch.int64),
            position_L=torch.zeros(1, dtype=torch.int64),
            row_N=torch.zeros(0, dtype=torch.int64),
            support_NU=torch.zeros(0, num_columns, dtype=torch.int64),
            teacher_logprobs_NB=torch.zeros(0, num_columns + 1),
            weight_N=torch.zeros(0),
            index_N=torch.zeros(0, dtype=torch.int64),
        )
    lengths = [len(s.token_ids) for s in sequences]
    offsets = np.cumsum([0, *lengths[:-1]])
    rows = [s.row_N + offset for s, offset in zip(sequences, offsets, strict=True)]
    return MicroBatch(
        token_ids_L=torch.from_numpy(np.concatenate([s.token_ids for s in sequences]).astype(np.int64)),
        position_L=torch.cat([torch.arange(n) for n in lengths]),
        row_N=torch.from_numpy(np.concatenate(rows)),
        support_NU=torch.from_numpy(np.concatenate([s.support_NU for s in sequences])),
        teacher_logprobs_NB=torch.from_numpy(np.concatenate([s.teacher_logprobs_NB for s in sequences])),
        weight_N=torch.from_numpy(np.concatenate([s.weight_N for s in sequences])),
        index_N=torch.from_numpy(np.concatenate([s.index_N for s in sequences])),
    )
