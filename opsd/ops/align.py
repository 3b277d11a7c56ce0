"""Where student and teacher meet: which hidden row predicts which token, and what both know of it.

The shift "row t predicts token t + 1" is made here, in `predicting_rows`, and nowhere else.
"""
# T response tokens, C student candidates, K teacher top-k, U support size, B = U + 1 buckets

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsd.ops.entropy import entropy_from_top
from opsd.ops.signals import Statistics, statistics_of
from opsd.types import ScoredRollout, TeacherScores, TokenStats, Vocabulary

NUM_COMPATIBLE = 16  # of the student's candidates; arXiv 2605.26844
GROUP_TOKENS = 8192  # enough that numpy's calls cost nothing; a batch of millions at once would take gigabytes
MIN_REST_MASS = 1e-6  # below it, 1 - sum of float32 probabilities is rounding noise


def predicting_rows(num_prompt_tokens: int, response_index_N: np.ndarray) -> np.ndarray:
    """Rows of prompt + response whose hidden state predicts the given response tokens. int64 [N] -> int64 [N]."""
    return num_prompt_tokens + response_index_N - 1


def lookup(query_ids_TC: np.ndarray, ids_TK: np.ndarray, logprobs_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, the log-probability at each queried id: ([T, C] float32, [T, C] bool found).

    An empty slot (-1) is never found.
    """
    num_rows, num_columns = ids_TK.shape
    if num_rows == 0 or num_columns == 0:
        return np.full(query_ids_TC.shape, -np.inf, np.float32), np.zeros(query_ids_TC.shape, bool)
    stride = int(max(ids_TK.max(), query_ids_TC.max(initial=0))) + 2
    row_T1 = np.arange(num_rows, dtype=np.int64)[:, None] * stride
    keys = (row_T1 + ids_TK + 1).ravel()  # one sorted list of (row, id) keys serves all rows
    order = np.argsort(keys, kind="stable")
    queries = (row_T1 + query_ids_TC + 1).ravel()
    slot = np.minimum(np.searchsorted(keys, queries, sorter=order), len(keys) - 1)
    match = order[slot]
    found = (keys[match] == queries) & (query_ids_TC.ravel() >= 0)
    logprobs = np.where(found, logprobs_TK.ravel()[match], -np.inf).astype(np.float32)
    return logprobs.reshape(query_ids_TC.shape), found.reshape(query_ids_TC.shape)


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """What both engines said of response tokens, those of rollouts one after another."""

    events_T: np.ndarray  # int64, the sampled tokens with every stop id mapped to the one stop event
    sampled_logprobs_T: np.ndarray  # float32, the student's, of the sampled event
    candidate_ids_TC: np.ndarray  # int32 event ids, the student's likeliest; -1 marks an empty slot
    candidate_logprobs_TC: np.ndarray  # float32; -inf in an empty slot
    top_ids_TK: np.ndarray  # int32 event ids, the teacher's likeliest
    top_logprobs_TK: np.ndarray  # float32
    teacher_sampled_T: np.ndarray  # float32, the teacher's log-probability of the sampled event
    teacher_candidates_TC: np.ndarray  # float32, at the student's candidates
    asked_T: np.ndarray  # bool: the teacher scored the candidates; else it knows of those in its top-k
    teacher_entropy_T: np.ndarray  # float32, nats; NaN where the teacher has not said it
    attention_T: np.ndarray | None  # float32, that the teacher pays to the token; None: not asked for

    @classmethod
    def in_groups(
        cls, scored: Sequence[ScoredRollout], vocabulary: Vocabulary, num_candidates: int = 0
    ) -> Iterator[TokenRows]:
        """All tokens in order, in groups of whole rollouts: of GROUP_TOKENS tokens and a rollout at most.

        A rollout with fewer candidates than another, or than `num_candidates`, has empty slots behind them.
        """
        num_candidates = max(num_candidates, *(item.rollout.candidate_ids.shape[1] for item in scored))
        group, num_tokens = [], 0
        for item in scored:
            group.append(item)
            num_tokens += len(item.rollout)
            if num_tokens >= GROUP_TOKENS or item is scored[-1]:
                yield cls._of(group, num_candidates, vocabulary)
                group, num_tokens = [], 0

    @classmethod
    def _of(cls, scored: list[ScoredRollout], num_candidates: int, vocabulary: Vocabulary) -> TokenRows:
        rollouts, scores = [item.rollout for item in scored], [item.scores for item in scored]
        response_T = np.concatenate([rollout.response_ids for rollout in rollouts]).astype(np.int64)
        attention = [own.attention for own in scores if own.attention is not None]
        return cls(
            events_T=np.where(np.isin(response_T, vocabulary.stop_ids), vocabulary.stop_event, response_T),
            sampled_logprobs_T=np.concatenate([rollout.sampled_logprobs for rollout in rollouts]),
            candidate_ids_TC=_stacked([r.candidate_ids for r in rollouts], num_candidates, empty=-1),
            candidate_logprobs_TC=_stacked([r.candidate_logprobs for r in rollouts], num_candidates, empty=-np.inf),
            top_ids_TK=np.concatenate([own.top_ids for own in scores]),
            top_logprobs_TK=np.concatenate([own.top_logprobs for own in scores]),
            teacher_sampled_T=np.concatenate([own.sampled_logprobs for own in scores]),
            teacher_candidates_TC=_stacked([_at_candidates(item) for item in scored], num_candidates, empty=-np.inf),
            asked_T=np.repeat([own.candidate_logprobs is not None for own in scores], [len(r) for r in rollouts]),
            teacher_entropy_T=np.concatenate([_entropy(own) for own in scores]),
            attention_T=np.concatenate(attention) if attention else None,
        )

    def __len__(self) -> int:
        return len(self.events_T)

    def take(self, index_N: np.ndarray) -> TokenRows:
        """The tokens at these places, in this order."""
        taken: dict[str, Any] = {name: None if rows is None else rows[index_N] for name, rows in vars(self).items()}
        return TokenRows(**taken)

    def teacher_at_candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's log-probabilities at the student's candidates, and where they are known: both [T, C]."""
        known_TC = self.candidate_ids_TC >= 0
        if self.asked_T.all():
            return self.teacher_candidates_TC, known_TC
        found_logprobs_TC, found_TC = lookup(self.candidate_ids_TC, self.top_ids_TK, self.top_logprobs_TK)
        asked_T1 = self.asked_T[:, None]
        logprobs_TC = np.where(asked_T1, self.teacher_candidates_TC, found_logprobs_TC)
        return logprobs_TC, np.where(asked_T1, known_TC, found_TC)


def num_events(vocabulary: Vocabulary) -> int:
    return vocabulary.size - len(vocabulary.foreign_ids) - len(vocabulary.stop_ids) + 1


def rest_logprob(logprobs_TU: np.ndarray, num_named_T: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """log of the mass that the named events leave, at least MIN_REST_MASS; -inf where all are named. float32 [T]."""
    rest = 1.0 - np.exp(logprobs_TU.astype(np.float64)).sum(axis=1)
    logprob = np.log(np.maximum(rest, MIN_REST_MASS))
    return np.where(num_named_T >= num_events(vocabulary), -np.inf, logprob).astype(np.float32)


def token_stats(rows: TokenRows, vocabulary: Vocabulary, statistics: Statistics | None = None) -> TokenStats:
    """What the rollout engine and the teacher returned, as statistics of each token, with no forward pass.

    What compares the two models is over the sampled token and the student's candidates for which the teacher's
    log-probability is known; all others share one rest bucket, so each divergence is a lower bound of the dense one,
    and how low differs from token to token: with a teacher that names its top K only, a student far from it has little
    mass on these tokens (`named_mass_T`), and the order of the tokens by divergence can be chance. The student's
    entropy extrapolates beyond the likeliest, the teacher's where the teacher has not said it. All are exact where
    every event is named. `statistics`: functions of the same buckets, for `TokenStats.extra`.
    Source: docs/selection.md, Statistics of a token.
    """
    teacher_TC, known_TC = rows.teacher_at_candidates()
    shared_TC = known_TC & (rows.candidate_ids_TC != rows.events_T[:, None])

    num_candidates_T = (rows.candidate_ids_TC >= 0).sum(axis=1)
    outside_T = rest_logprob(rows.candidate_logprobs_TC, num_candidates_T, vocabulary)
    entropy_T = entropy_from_top(rows.candidate_logprobs_TC, outside_T, num_events(vocabulary))
    teacher_entropy_T = rows.teacher_entropy_T
    if np.isnan(teacher_entropy_T).any():
        teacher_outside_T = rest_logprob(rows.top_logprobs_TK, (rows.top_ids_TK >= 0).sum(axis=1), vocabulary)
        from_top_T = entropy_from_top(rows.top_logprobs_TK, teacher_outside_T, num_events(vocabulary))
        teacher_entropy_T = np.where(np.isnan(teacher_entropy_T), from_top_T, teacher_entropy_T)

    num_named_T = 1 + shared_TC.sum(axis=1)
    student_TC = np.where(shared_TC, rows.candidate_logprobs_TC, -np.inf)
    teacher_TC = np.where(shared_TC, teacher_TC, -np.inf)
    student_TB = _with_rest(np.column_stack([rows.sampled_logprobs_T, student_TC]), num_named_T, vocabulary)
    teacher_TB = _with_rest(np.column_stack([rows.teacher_sampled_T, teacher_TC]), num_named_T, vocabulary)
    ids_TU = np.column_stack([rows.events_T, np.where(shared_TC, rows.candidate_ids_TC, -1)])
    buckets = (torch.from_numpy(each) for each in (student_TB, teacher_TB, ids_TU))
    named_T = np.exp(rows.sampled_logprobs_T.astype(np.float64)) + np.exp(student_TC.astype(np.float64)).sum(axis=1)
    return TokenStats(
        entropy_T=_share_of_log_size(entropy_T, vocabulary),
        reverse_kl_T=torch.from_numpy(_kl(student_TB, teacher_TB).astype(np.float32)),
        forward_kl_T=torch.from_numpy(_kl(teacher_TB, student_TB).astype(np.float32)),
        compatibility_T=compatibility(rows),
        student_logprob_T=torch.from_numpy(rows.sampled_logprobs_T),
        teacher_logprob_T=torch.from_numpy(rows.teacher_sampled_T),
        teacher_entropy_T=_share_of_log_size(teacher_entropy_T, vocabulary),
        named_mass_T=torch.from_numpy(np.minimum(named_T, 1.0).astype(np.float32)),
        attention_T=None if rows.attention_T is None else torch.from_numpy(rows.attention_T),
        extra={name: value_T.float() for name, value_T in statistics_of(statistics or {}, *buckets).items()},
    )


def compatibility(rows: TokenRows) -> Tensor:
    """The teacher's mass on the student's NUM_COMPATIBLE likeliest events, float32 [T] in [0, 1].

    On as many as the rollout has where these are fewer. A candidate at which the teacher's log-probability is not known
    counts as 0: a lower bound, short by at most the mass outside the teacher's top-k. Source: arXiv 2605.26844.
    """
    logprobs_TC, known_TC = rows.teacher_at_candidates()
    is_sampled_TC = rows.candidate_ids_TC == rows.events_T[:, None]
    known_TC = np.where(known_TC, logprobs_TC, -np.inf)
    logprobs_TC = np.where(is_sampled_TC, rows.teacher_sampled_T[:, None], known_TC)
    mass_T = np.exp(logprobs_TC[:, :NUM_COMPATIBLE].astype(np.float64)).sum(axis=1)
    return torch.from_numpy(np.minimum(mass_T, 1.0).astype(np.float32))


def support_buckets(rows: TokenRows, support: str, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """The events that get a bucket of their own in the loss, and the teacher's log-probabilities there.

    `support` is teacher (its top-k), student (the student's candidates), union or sampled (neither); the sampled event
    is always in.
    Returns ids int64 [T, U] (-1 empty) and log-probabilities float32 [T, U + 1], the rest bucket last.
    """
    event_T1 = rows.events_T[:, None]
    ids, logprobs = [event_T1], [rows.teacher_sampled_T[:, None]]
    if support in ("teacher", "union"):
        ids.append(np.where(rows.top_ids_TK == event_T1, -1, rows.top_ids_TK))
        logprobs.append(rows.top_logprobs_TK)
    if support in ("student", "union"):
        assert rows.asked_T.all()  # preflight refuses the backends that cannot
        repeated = rows.candidate_ids_TC == event_T1
        if support == "union":
            repeated |= lookup(rows.candidate_ids_TC, rows.top_ids_TK, rows.top_logprobs_TK)[1]
        ids.append(np.where(repeated, -1, rows.candidate_ids_TC))
        logprobs.append(rows.teacher_candidates_TC)
    ids_TU = np.concatenate(ids, axis=1).astype(np.int64)
    logprobs_TU = np.where(ids_TU >= 0, np.concatenate(logprobs, axis=1), -np.inf).astype(np.float32)
    rest_T = rest_logprob(logprobs_TU, (ids_TU >= 0).sum(axis=1), vocabulary)
    return ids_TU, np.concatenate([logprobs_TU, rest_T[:, None]], axis=1)


def sampled_outside(rows: TokenRows, support: str, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Where the sampled event is in none of the lists that the support is made of, and the teacher's mass outside them.

    `support_buckets` names that event in any case, so its buckets depend on what was sampled. The lists do not.
    Returns bool [T], and the log of the mass float32 [T] with the bounds of `rest_logprob`.
    """
    event_T1 = rows.events_T[:, None]
    outside_T = np.ones(len(rows), bool)
    if support in ("teacher", "union"):
        outside_T &= (rows.top_ids_TK != event_T1).all(axis=1)
    if support in ("student", "union"):
        outside_T &= (rows.candidate_ids_TC != event_T1).all(axis=1)
    ids_TU, logprobs_TB = support_buckets(rows, support, vocabulary)
    logprobs_TU = logprobs_TB[:, :-1].copy()
    logprobs_TU[outside_T, 0] = -np.inf
    return outside_T, rest_logprob(logprobs_TU, (ids_TU >= 0).sum(axis=1) - outside_T, vocabulary)


def _share_of_log_size(entropy_T: np.ndarray, vocabulary: Vocabulary) -> Tensor:
    return torch.from_numpy(np.clip(entropy_T / math.log(vocabulary.size), 0.0, 1.0).astype(np.float32))


def _stacked(parts: list[np.ndarray], width: int, empty: float) -> np.ndarray:
    """The rows of all parts, each filled up to `width`."""
    missing = [((0, 0), (0, width - part.shape[1])) for part in parts]
    wide = [np.pad(p, m, constant_values=empty) if m[1][1] else p for p, m in zip(parts, missing, strict=True)]
    return np.concatenate(wide)


def _entropy(scores: TeacherScores) -> np.ndarray:
    return np.full(len(scores.sampled_logprobs), np.nan, np.float32) if scores.entropy is None else scores.entropy


def _at_candidates(item: ScoredRollout) -> np.ndarray:
    if item.scores.candidate_logprobs is not None:
        return item.scores.candidate_logprobs
    return np.full(item.rollout.candidate_ids.shape, -np.inf, np.float32)


def _with_rest(logprobs_TU: np.ndarray, num_named_T: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The buckets with the rest appended, normalised in float64 so that no divergence comes out below zero."""
    rest_T = rest_logprob(logprobs_TU, num_named_T, vocabulary)
    logprobs_TB = np.concatenate([logprobs_TU, rest_T[:, None]], axis=1).astype(np.float64)
    return logprobs_TB - np.log(np.exp(logprobs_TB).sum(axis=1, keepdims=True))


def _kl(of_TB: np.ndarray, against_TB: np.ndarray) -> np.ndarray:
    """KL(of || against) over the buckets; an empty bucket adds nothing."""
    empty = np.isneginf(of_TB)
    difference = np.where(empty, 0.0, of_TB) - np.where(empty, 0.0, against_TB)
    return np.maximum((np.exp(of_TB) * difference).sum(axis=1), 0.0)
