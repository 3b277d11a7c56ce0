"""From kept tokens to balanced, padding-free micro-batches."""
# N kept tokens, U support size, L tokens of a packed micro-batch

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsd.learner.micro_batch import MicroBatch, TrainSequence
from opsd.ops.align import TokenRows, predicting_rows, support_buckets
from opsd.types import Mixture, ScoredRollout, Selection, Vocabulary


def build_sequences(
    scored: list[ScoredRollout], selection: Selection, support: str, vocabulary: Vocabulary
) -> list[TrainSequence]:
    """One TrainSequence for each rollout that keeps a token, weights divided by the selection's denominator.

    A sequence ends at the last row that predicts a kept token: what follows cannot change the loss.
    """
    index_N = selection.index_N.numpy()
    denominator = selection.weight_N.sum() if selection.denominator is None else selection.denominator
    weight_N = (selection.weight_N / denominator).numpy()
    temperature_N = None if selection.temperature_N is None else selection.temperature_N.numpy()
    inputs = {name: values.numpy() for name, values in selection.inputs.items()}
    ends = np.cumsum([len(item.rollout) for item in scored])
    support_NU, teacher_NB = kept_buckets(scored, index_N, support, vocabulary)
    bounds = np.searchsorted(index_N, np.concatenate([[0], ends]))
    sequences = []
    for item, start, stop, end in zip(scored, bounds[:-1], bounds[1:], ends, strict=True):
        if start == stop:
            continue
        kept_N = index_N[start:stop] - (end - len(item.rollout))
        prompt_ids = item.rollout.prompt.token_ids
        row_N = predicting_rows(len(prompt_ids), kept_N)
        length = row_N[-1] + 1
        sequences.append(
            TrainSequence(
                token_ids=np.concatenate([prompt_ids, item.rollout.response_ids])[:length],
                row_N=row_N,
                support_NU=support_NU[start:stop],
                teacher_logprobs_NB=teacher_NB[start:stop],
                weight_N=weight_N[start:stop],
                index_N=index_N[start:stop],
                temperature_N=None if temperature_N is None else temperature_N[start:stop],
                mixture=_cut(item.rollout.mixture, length),
                inputs={name: values[start:stop] for name, values in inputs.items()},
            )
        )
    return sequences


def kept_buckets(
    scored: list[ScoredRollout], index_N: np.ndarray, support: str, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """`support_buckets` of the tokens at `index_N`, ascending places in the batch: [N, U] and [N, U + 1]."""
    parts, start = [], 0
    for rows in TokenRows.in_groups(scored, vocabulary):
        first, last = np.searchsorted(index_N, [start, start + len(rows)])
        parts.append(support_buckets(rows.take(index_N[first:last] - start), support, vocabulary))
        start += len(rows)
    ids, logprobs = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(logprobs)


def _cut(mixture: Mixture | None, length: int) -> Mixture | None:
    return None if mixture is None else replace(mixture, other_ids=mixture.other_ids[:length])


def pack(sequences: list[TrainSequence], num_ranks: int, max_tokens: int) -> list[list[MicroBatch]]:
    """Micro-batches for each rank: equal in number over ranks, near equal in tokens, at most max_tokens each.

    A sequence longer than max_tokens gets a micro-batch of its own, so with max_tokens 0 each does. A rank without a
    sequence gets an empty micro-batch, because every rank must take part in every collective.
    """
    by_rank: list[list[TrainSequence]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for sequence in sorted(sequences, key=lambda s: -len(s.token_ids)):
        rank = load.index(min(load))
        by_rank[rank].append(sequence)
        load[rank] += len(sequence.token_ids)
    groups = [_fill(rank_sequences, max_tokens) for rank_sequences in by_rank]
    num_micro_batches = max(1, max(len(g) for g in groups))
    empty = _no_rows(sequences[0])
    return [[_concatenate(g[i]) if i < len(g) else empty for i in range(num_micro_batches)] for g in groups]


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


def _concatenate(sequences: list[TrainSequence]) -> MicroBatch:
    lengths = [len(s.token_ids) for s in sequences]
    offsets = np.cumsum([0, *lengths[:-1]])
    rows = [s.row_N + offset for s, offset in zip(sequences, offsets, strict=True)]

    def joined(parts: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(list(parts)))

    temperatures = [s.temperature_N for s in sequences if s.temperature_N is not None]
    assert len(temperatures) in (0, len(sequences)), "some sequences of a row have temperatures, others none"
    mixed = {}
    if any(s.mixture is not None for s in sequences):
        mixtures = [s.mixture or Mixture(other_ids=s.token_ids, own_share=1.0) for s in sequences]
        mixed["other_ids_L"] = joined(m.other_ids.astype(np.int64) for m in mixtures)
        mixed["own_share_L"] = joined(np.full(len(m.other_ids), m.own_share, np.float32) for m in mixtures)
    return MicroBatch(
        token_ids_L=joined(s.token_ids.astype(np.int64) for s in sequences),
        position_L=torch.cat([torch.arange(n) for n in lengths]),
        cu_seq_lens=torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        max_length=max(lengths),
        row_N=joined(rows),
        support_NU=joined(s.support_NU for s in sequences),
        teacher_logprobs_NB=joined(s.teacher_logprobs_NB for s in sequences),
        weight_N=joined(s.weight_N for s in sequences),
        index_N=joined(s.index_N for s in sequences),
        temperature_N=joined(temperatures) if temperatures else None,
        inputs={name: joined(s.inputs[name] for s in sequences) for name in sequences[0].inputs},
        **mixed,
    )


def _no_rows(like: TrainSequence) -> MicroBatch:
    """One token to run the trunk on, and no kept row."""
    one = replace(like, token_ids=like.token_ids[:1], mixture=None)
    batch = _concatenate([one])
    trunk = ("token_ids_L", "position_L", "cu_seq_lens")
    rows = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in trunk}
    nothing: dict[str, Any] = {name: value[:0] for name, value in rows.items() if isinstance(value, Tensor)}
    return replace(batch, **nothing, inputs={name: value[:0] for name, value in batch.inputs.items()})
