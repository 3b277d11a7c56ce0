"""Of scored rollouts what a learner's rank needs: the tokens of whole sequences, and of kept tokens the buckets.

As numpy arrays, which travel between processes without being copied into a pickle.
"""
# N kept tokens, U support size, S sequences, L tokens of all of them, E the teacher's width

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from opsd.ops.align import TokenRows, predicting_rows, sampled_outside, support_buckets
from opsd.ops.losses.objective import RESIDUAL_INPUTS, ROLLOUT_LOGPROB
from opsd.payload.scored import ScoredBatch
from opsd.types import Rollout, ScoredRollout, TeacherScores, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the learner's ranks need of each kept token."""

    support: str  # see support_buckets
    num_candidates: int  # of a token, at most, in the whole batch: all ranks have buckets of one width
    asked: frozenset[str] = frozenset()  # what the loss takes; of PACKED_INPUTS the rows get it here
    with_hidden: bool = False  # the teacher's hidden states, too


@dataclass(frozen=True, kw_only=True)
class KeptRows:
    """Sequences one after another, each cut after its last kept row: what follows cannot change the loss."""

    length_S: np.ndarray  # int64, tokens of each sequence
    num_kept_S: np.ndarray  # int64, kept rows of each, at least one
    token_ids_L: np.ndarray  # int32
    row_N: np.ndarray  # int64, into its own sequence: whose hidden state predicts a kept token
    support_NU: np.ndarray  # int32 event ids; -1 marks an empty slot
    teacher_logprobs_NB: np.ndarray  # float32 [N, U + 1], the rest bucket last; -inf in an empty slot
    inputs: dict[str, np.ndarray]  # [N] each, those of PACKED_INPUTS that were asked for, by name
    hidden_NE: np.ndarray | None  # the teacher's last hidden states, float32 or bfloat16 as uint16
    other_ids_L: np.ndarray | None  # int32, see Mixture; None: nothing is mixed
    own_share_L: np.ndarray | None  # float32


def kept_rows(scored: ScoredBatch, index_N: np.ndarray, wanted: Wanted, vocabulary: Vocabulary) -> KeptRows:
    """Of every rollout that keeps a token. `index_N`: places in the batch's tokens, ascending; none is allowed."""
    index_N = np.asarray(index_N)
    kept = list(_kept_of_each(scored, index_N))
    own_rollouts = [(item.rollout, own_N) for item, own_N in kept]
    row_of_each = [predicting_rows(len(r.prompt.token_ids), r.place_T[own_N]) for r, own_N in own_rollouts]
    lengths = [int(row_N[-1]) + 1 for row_N in row_of_each]
    token_ids = [_sequence(item.rollout)[:length] for (item, _), length in zip(kept, lengths, strict=True)]
    buckets, found = [], defaultdict(list)
    for rows in _rows_at(scored, kept, wanted.num_candidates, vocabulary):
        buckets.append(support_buckets(rows, wanted.support, vocabulary))
        if not RESIDUAL_INPUTS.isdisjoint(wanted.asked):
            outside_N, tail_N = sampled_outside(rows, wanted.support, vocabulary)
            found["outside_N"].append(outside_N)
            found["teacher_tail_N"].append(tail_N)
        if ROLLOUT_LOGPROB in wanted.asked:
            found[ROLLOUT_LOGPROB].append(rows.sampled_logprobs_T)
    support, teacher = (np.concatenate(part) for part in zip(*buckets, strict=True))
    return KeptRows(
        length_S=np.array(lengths, np.int64),
        num_kept_S=np.array([len(own_N) for _, own_N in kept], np.int64),
        token_ids_L=np.concatenate([np.zeros(0, np.int32), *token_ids]),
        row_N=np.concatenate([np.zeros(0, np.int64), *row_of_each]),
        support_NU=support.astype(np.int32),
        teacher_logprobs_NB=teacher,
        inputs={name: np.concatenate(parts) for name, parts in found.items()},
        hidden_NE=_hidden(scored, kept) if wanted.with_hidden else None,
        **_mixed([item.rollout for item, _ in kept], token_ids),
    )


def joined(parts: Sequence[KeptRows]) -> KeptRows:
    """The sequences of all parts, one after another. A part in which nothing is mixed is mixed with itself."""
    if len(parts) == 1:
        return parts[0]
    if any(part.other_ids_L is not None for part in parts):
        parts = [_mixed_with_itself(part) for part in parts]
    names = [each.name for each in fields(KeptRows) if each.name != "inputs"]
    columns = {name: [getattr(part, name) for part in parts] for name in names}
    found: dict[str, Any] = {n: None if c[0] is None else np.concatenate(c) for n, c in columns.items()}
    inputs = {name: np.concatenate([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    return KeptRows(**found, inputs=inputs)


def kept_buckets(
    scored: ScoredBatch, index_N: np.ndarray, support: str, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """`support_buckets` of the tokens at `index_N`, ascending places in the batch: [N, U] and [N, U + 1]."""
    wanted = Wanted(support=support, num_candidates=scored.num_candidates)
    rows = kept_rows(scored, index_N, wanted, vocabulary)
    return rows.support_NU.astype(np.int64), rows.teacher_logprobs_NB


def _kept_of_each(scored: ScoredBatch, index_N: np.ndarray) -> Iterator[tuple[ScoredRollout, np.ndarray]]:
    """Each rollout that keeps a token, and the places of its kept tokens in its response."""
    first_R = np.searchsorted(index_N, scored.bounds)  # place in index_N of each rollout's first kept token, and N
    for number in np.diff(first_R).nonzero()[0].tolist():
        yield scored.items[number], index_N[first_R[number] : first_R[number + 1]] - scored.bounds[number]


def _rows_at(
    scored: ScoredBatch,
    kept: Collection[tuple[ScoredRollout, np.ndarray]],
    num_candidates: int,
    vocabulary: Vocabulary,
) -> Iterator[TokenRows]:
    """What both engines said of the kept tokens, a group of rollouts at a time; no token of one rollout for none."""
    if kept:
        yield from TokenRows.in_groups([_only(*each) for each in kept], vocabulary, num_candidates)
    else:
        for rows in TokenRows.in_groups(scored.items[:1], vocabulary, num_candidates):
            yield rows.take(np.arange(0))


def _only(item: ScoredRollout, own_N: np.ndarray) -> ScoredRollout:
    """The rollout as if it had these tokens alone: for what is said of one token by itself."""
    rollout, scores = item.rollout, item.scores
    if len(own_N) == len(rollout):
        return item
    columns = ("response_ids", "sampled_logprobs", "candidate_ids", "candidate_logprobs")
    own: dict[str, Any] = {name: getattr(rollout, name)[own_N] for name in columns}
    said: dict[str, Any] = {each.name: getattr(scores, each.name) for each in fields(TeacherScores)}
    said = {name: None if values is None or name == "hidden" else values[own_N] for name, values in said.items()}
    alone = replace(rollout, **own, mixture=None, trajectory=None, token_versions=None)
    return ScoredRollout(rollout=alone, scores=TeacherScores(**said))


def _hidden(scored: ScoredBatch, kept: Sequence[tuple[ScoredRollout, np.ndarray]]) -> np.ndarray:
    """[N, E], the teacher's hidden states of the kept tokens."""
    parts = []
    for item, own_N in kept or [(scored.items[0], np.arange(0))]:
        assert item.scores.hidden is not None, "loss.payload=hidden asks every engine for them"
        parts.append(item.scores.hidden[own_N])
    return np.concatenate(parts)


def _sequence(rollout: Rollout) -> np.ndarray:
    return np.concatenate([rollout.prompt.token_ids, rollout.read_ids])


def _mixed(rollouts: list[Rollout], token_ids: list[np.ndarray]) -> dict[str, Any]:
    """The other sequences, cut as their own ones are; a rollout without one is mixed with itself."""
    if all(rollout.mixture is None for rollout in rollouts):
        return {"other_ids_L": None, "own_share_L": None}
    other, share = [], []
    for rollout, ids in zip(rollouts, token_ids, strict=True):
        other.append(ids if rollout.mixture is None else rollout.mixture.other_ids[: len(ids)].astype(np.int32))
        share.append(np.full(len(ids), 1.0 if rollout.mixture is None else rollout.mixture.own_share, np.float32))
    return {"other_ids_L": np.concatenate(other), "own_share_L": np.concatenate(share)}


def _mixed_with_itself(part: KeptRows) -> KeptRows:
    if part.other_ids_L is not None:
        return part
    return replace(part, other_ids_L=part.token_ids_L, own_share_L=np.ones(len(part.token_ids_L), np.float32))
