"""What the driver decides of a step: which sequences each rank gets, in which micro-batches. It needs lengths only.

A rank fetches the kept rows of its sequences from where the payload is, and packs them itself.
"""
# R rollouts, N kept tokens

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from opsd.batch import ranges
from opsd.errors import StageError
from opsd.ops.align import predicting_rows
from opsd.ops.losses.objective import RESIDUAL_INPUTS, ROLLOUT_LOGPROB
from opsd.payload.keeper import Payload
from opsd.payload.kept import Wanted
from opsd.types import Rollout, Selection


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """What a rank is told beside the rows that it fetches: their sequences and kept tokens stand in the same order."""

    micro_batches: tuple[tuple[int, ...], ...]  # the sequences of each, by number; none: no rows
    index_N: np.ndarray  # int64, into the global batch's tokens
    weight_N: np.ndarray  # float32, already divided by the global batch's sum of weights
    temperature_N: np.ndarray | None
    inputs: dict[str, np.ndarray]  # [N] each, the selection's


@dataclass(frozen=True, kw_only=True)
class Share:
    """A rank's part of a step."""

    work: RankWork
    places: dict[int, np.ndarray]  # by number of a payload, where in it the rank's kept tokens are, ascending


def deal(
    rollouts: Sequence[Rollout],
    selection: Selection,
    *,
    payload_R: np.ndarray,
    first_R: np.ndarray,
    num_ranks: int,
    max_tokens: int,
) -> list[Share]:
    """Each rank's share: micro-batches equal in number over ranks, near equal in tokens, at most max_tokens each.

    A sequence ends at the last row that predicts a kept token. One longer than max_tokens gets a micro-batch of its
    own, so with max_tokens 0 each does. A rank without a sequence gets a micro-batch without rows, because every rank
    must take part in every collective. `payload_R`, `first_R`: where the payload is, see StepBatch.
    """
    bounds = np.cumsum([0, *map(len, rollouts)])
    index_N = selection.index_N.numpy()
    first = np.searchsorted(index_N, bounds)  # place in index_N of each rollout's first kept token, and N
    learnt = np.diff(first).nonzero()[0]
    last = index_N[first[1:][learnt] - 1] - bounds[learnt]
    own = [(rollouts[number], token) for number, token in zip(learnt.tolist(), last.tolist(), strict=True)]
    lengths = [int(predicting_rows(len(r.prompt.token_ids), r.place_T[token])) + 1 for r, token in own]
    by_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for sequence in sorted(range(len(lengths)), key=lambda s: -lengths[s]):
        rank = load.index(min(load))
        by_rank[rank].append(sequence)
        load[rank] += lengths[sequence]
    groups = [_fill(sequences, lengths, max_tokens) for sequences in by_rank]
    num_micro_batches = max(1, max(map(len, groups)))
    own_weights, shares = scaled(selection), []
    for group in groups:
        # As they stand in the payloads, one payload after another: so the rank joins what it has fetched.
        order = sorted((s for own in group for s in own), key=lambda s: (payload_R[learnt[s]], first_R[learnt[s]]))
        number = {sequence: place for place, sequence in enumerate(order)}
        own_R = learnt[order].astype(np.int64)
        num_kept = np.diff(first)[own_R]
        kept_N = ranges(first[own_R], num_kept)
        place_N = index_N[kept_N] + np.repeat(first_R[own_R] - bounds[own_R], num_kept)
        payload_N = np.repeat(payload_R[own_R], num_kept)
        micro_batches = [tuple(number[s] for s in own) for own in group]
        micro_batches += [()] * (num_micro_batches - len(group))
        shares.append(
            Share(
                work=work_of(own_weights, kept_N, tuple(micro_batches)),
                places={int(p): place_N[payload_N == p] for p in np.unique(payload_N)},
            )
        )
    return shares


def rows_for(shares: Sequence[Share], payloads: Sequence[Payload], wanted: Wanted) -> list[list[Any]]:
    """For each share the parts of its kept rows, payload after payload, or references to them. Does not wait."""
    nothing = {0: np.zeros(0, np.int64)}  # of some payload, for the widths of a micro-batch without rows
    places: list[Mapping[int, np.ndarray]] = [share.places or nothing for share in shares]
    rows: list[list[Any]] = [[] for _ in shares]
    for number, payload in enumerate(payloads):
        ranks = [rank for rank, own in enumerate(places) if number in own]
        found = payload.rows([places[rank][number] for rank in ranks], wanted) if ranks else []
        for rank, part in zip(ranks, found, strict=True):
            rows[rank].append(part)
    return rows


def kept_in(shares: Sequence[Share], payload: int) -> np.ndarray:
    """The places in a payload of all tokens that are kept of it, ascending."""
    return np.sort(np.concatenate([np.zeros(0, np.int64), *(s.places[payload] for s in shares if payload in s.places)]))


def require_draws(rollouts: Sequence[Rollout], asked: Collection[str]) -> None:
    """Raises StageError where an answer is no draw of the student, and the loss asks for figures of draws."""
    settings = {"loss.residual=true": RESIDUAL_INPUTS, "loss.importance_cap": {ROLLOUT_LOGPROB}}
    for setting in (name for name, inputs in settings.items() if not inputs.isdisjoint(asked)):
        for rollout in rollouts:
            if rollout.policy_version < 0 or rollout.mixture is not None:
                raise StageError(
                    f"learn: {setting} learns from the student's own answers alone, and one to prompt "
                    f"{rollout.prompt.index} is not its own"
                )


def scaled(selection: Selection) -> Selection:
    """Its weights divided by its denominator, of the whole batch."""
    denominator = selection.weight_N.sum() if selection.denominator is None else selection.denominator
    return replace(selection, weight_N=selection.weight_N / denominator, denominator=None)


def work_of(selection: Selection, kept_N: np.ndarray, micro_batches: tuple[tuple[int, ...], ...]) -> RankWork:
    """`kept_N`: which of the selection's tokens, in order."""
    own_N = torch.from_numpy(kept_N)
    return RankWork(
        micro_batches=micro_batches,
        index_N=selection.index_N[own_N].numpy(),
        weight_N=selection.weight_N[own_N].numpy(),
        temperature_N=None if selection.temperature_N is None else selection.temperature_N[own_N].numpy(),
        inputs={name: values[own_N].numpy() for name, values in selection.inputs.items()},
    )


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
