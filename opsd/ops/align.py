"""Where student and teacher meet: which hidden row predicts which token, and what both know of it.

The shift "row t predicts token t + 1" is made here, in `predicting_rows`, and nowhere else.
"""
# T response tokens, C student candidates, K teacher top-k, U support size, B = U + 1 buckets

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from opsd.ops.entropy import entropy_from_top
from opsd.ops.signals import hellinger, reverse_kl_grad_norm
from opsd.types import Rollout, TeacherScores, TokenStats, Vocabulary

NUM_COMPATIBLE = 16  # of the student's candidates; arXiv 2605.26844
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


def sampled_events(rollout: Rollout, vocabulary: Vocabulary) -> np.ndarray:
    """The sampled tokens with every stop id mapped to the one stop event. int64 [T]."""
    ids = rollout.response_ids.astype(np.int64)
    return np.where(np.isin(ids, vocabulary.stop_ids), vocabulary.stop_event, ids)


def num_events(vocabulary: Vocabulary) -> int:
    return vocabulary.size - len(vocabulary.stop_ids) + 1


def rest_logprob(logprobs_TU: np.ndarray, num_named_T: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """log of the mass that the named events leave, at least MIN_REST_MASS; -inf where all are named. float32 [T]."""
    rest = 1.0 - np.exp(logprobs_TU.astype(np.float64)).sum(axis=1)
    logprob = np.log(np.maximum(rest, MIN_REST_MASS))
    return np.where(num_named_T >= num_events(vocabulary), -np.inf, logprob).astype(np.float32)


def token_stats(rollout: Rollout, scores: TeacherScores, vocabulary: Vocabulary) -> TokenStats:
    """What the rollout engine and the teacher returned, as statistics of each token, with no forward pass.

    What compares the two models is over the sampled token and the student's candidates for which the teacher's
    log-probability is known; all others share one rest bucket, so each divergence is a lower bound of the dense one.
    The entropy extrapolates beyond the candidates. All are exact where every event is named. METHODS 1 and 2
    (`stats: rollout`).
    """
    event_T1 = sampled_events(rollout, vocabulary)[:, None]
    teacher_TC, known_TC = teacher_at_candidates(rollout, scores)
    shared_TC = known_TC & (rollout.candidate_ids != event_T1)

    num_candidates_T = (rollout.candidate_ids >= 0).sum(axis=1)
    outside_T = rest_logprob(rollout.candidate_logprobs, num_candidates_T, vocabulary)
    entropy_T = entropy_from_top(rollout.candidate_logprobs, outside_T, num_events(vocabulary))

    sampled_T1 = rollout.sampled_logprobs[:, None]
    num_named_T = 1 + shared_TC.sum(axis=1)
    student_TU = np.concatenate([sampled_T1, np.where(shared_TC, rollout.candidate_logprobs, -np.inf)], axis=1)
    teacher_TU = np.concatenate([scores.sampled_logprobs[:, None], np.where(shared_TC, teacher_TC, -np.inf)], axis=1)
    student_TB = _with_rest(student_TU, num_named_T, vocabulary)
    teacher_TB = _with_rest(teacher_TU, num_named_T, vocabulary)
    buckets = torch.from_numpy(student_TB), torch.from_numpy(teacher_TB)
    return TokenStats(
        entropy_T=torch.from_numpy(np.clip(entropy_T / math.log(vocabulary.size), 0.0, 1.0).astype(np.float32)),
        reverse_kl_T=torch.from_numpy(_kl(student_TB, teacher_TB).astype(np.float32)),
        forward_kl_T=torch.from_numpy(_kl(teacher_TB, student_TB).astype(np.float32)),
        hellinger_T=hellinger(*buckets).float(),
        grad_norm_T=reverse_kl_grad_norm(*buckets).float(),
        compatibility_T=compatibility(rollout, scores, vocabulary),
        student_logprob_T=torch.tensor(rollout.sampled_logprobs),
        teacher_logprob_T=torch.tensor(scores.sampled_logprobs),
    )


def teacher_at_candidates(rollout: Rollout, scores: TeacherScores) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's log-probabilities at the student's candidates, and where they are known: both [T, C].

    Known at each candidate where the teacher was asked for them, else at those that are in its top-k.
    """
    if scores.candidate_logprobs is None:
        return lookup(rollout.candidate_ids, scores.top_ids, scores.top_logprobs)
    return scores.candidate_logprobs, rollout.candidate_ids >= 0


def compatibility(rollout: Rollout, scores: TeacherScores, vocabulary: Vocabulary) -> Tensor:
    """The teacher's mass on the student's NUM_COMPATIBLE likeliest events, float32 [T] in [0, 1].

    On as many as the rollout has where these are fewer. A candidate at which the teacher's log-probability is not known
    counts as 0: a lower bound, short by at most the mass outside the teacher's top-k. Source: arXiv 2605.26844.
    """
    logprobs_TC, known_TC = teacher_at_candidates(rollout, scores)
    is_sampled_TC = rollout.candidate_ids == sampled_events(rollout, vocabulary)[:, None]
    logprobs_TC = np.where(is_sampled_TC, scores.sampled_logprobs[:, None], np.where(known_TC, logprobs_TC, -np.inf))
    mass_T = np.exp(logprobs_TC[:, :NUM_COMPATIBLE].astype(np.float64)).sum(axis=1)
    return torch.from_numpy(np.minimum(mass_T, 1.0).astype(np.float32))


def support_buckets(
    rollout: Rollout, scores: TeacherScores, support: str, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """The events that get a bucket of their own in the loss, and the teacher's log-probabilities there.

    `support` is teacher (its top-k), student (the student's candidates) or union; the sampled event is always in.
    Returns ids int64 [T, U] (-1 empty) and log-probabilities float32 [T, U + 1], the rest bucket last.
    """
    event_T1 = sampled_events(rollout, vocabulary)[:, None]
    ids, logprobs = [event_T1], [scores.sampled_logprobs[:, None]]
    if support in ("teacher", "union"):
        ids.append(np.where(scores.top_ids == event_T1, -1, scores.top_ids))
        logprobs.append(scores.top_logprobs)
    if support in ("student", "union"):
        assert scores.candidate_logprobs is not None  # preflight refuses the backends that cannot
        repeated = rollout.candidate_ids == event_T1
        if support == "union":
            repeated |= lookup(rollout.candidate_ids, scores.top_ids, scores.top_logprobs)[1]
        ids.append(np.where(repeated, -1, rollout.candidate_ids))
        logprobs.append(scores.candidate_logprobs)
    ids_TU = np.concatenate(ids, axis=1).astype(np.int64)
    logprobs_TU = np.where(ids_TU >= 0, np.concatenate(logprobs, axis=1), -np.inf).astype(np.float32)
    rest_T = rest_logprob(logprobs_TU, (ids_TU >= 0).sum(axis=1), vocabulary)
    return ids_TU, np.concatenate([logprobs_TU, rest_T[:, None]], axis=1)


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
