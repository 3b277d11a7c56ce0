"""Whether what a teacher returned can be its log-probabilities of the tokens that it was asked about.

A server with other weights, a head of zeros or answers that belong to another request would train a student silently
on nonsense. So scores are looked at where they enter a step, in passes over arrays that are there anyway.
"""
# T response tokens of all rollouts, K teacher top-k, Q tokens asked about

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from opsd.errors import StageError
from opsd.types import ScoredRollout, Vocabulary

TOLERANCE = 1e-3  # nats; both numbers come of one softmax
FLAT = 1e-4  # nats between a row's first and last likeliest token: no trained model is so undecided on every row


def check_scores(teacher: str, items: Sequence[ScoredRollout], vocabulary: Vocabulary) -> None:
    """Raises StageError that names the teacher where its scores contradict themselves.

    `items`: rollouts of one teacher, whose scores have no NaN.
    """
    if not items:
        return
    top_ids_TK = np.concatenate([item.scores.top_ids for item in items])
    top_logprobs_TK = np.concatenate([item.scores.top_logprobs for item in items])
    _check_mass(teacher, items, top_logprobs_TK)
    response_T = np.concatenate([item.rollout.response_ids for item in items])
    events_T = np.where(np.isin(response_T, vocabulary.stop_ids), vocabulary.stop_event, response_T)
    sampled_T = np.concatenate([item.scores.sampled_logprobs for item in items])
    _check_agreement(teacher, items, (events_T, sampled_T), (top_ids_TK, top_logprobs_TK))
    first = [  # the student's likeliest stands for all of its candidates
        (item.rollout.candidate_ids[:, 0], item.scores.candidate_logprobs[:, 0])
        for item in items
        if item.scores.candidate_logprobs is not None
    ]
    if len(first) == len(items):
        first_T, known_T = (np.concatenate(column) for column in zip(*first, strict=True))
        _check_agreement(teacher, items, (first_T, known_T), (top_ids_TK, top_logprobs_TK))


def _check_agreement(
    teacher: str,
    items: Sequence[ScoredRollout],
    asked: tuple[np.ndarray, np.ndarray],
    top: tuple[np.ndarray, np.ndarray],
) -> None:
    """A token that was asked about has the same log-probability among the likeliest, or less than the last of them."""
    (ids_T, logprobs_T), (top_ids_TK, top_logprobs_TK) = asked, top
    same_TK = top_ids_TK == np.where(ids_T < 0, -2, ids_T)[:, None]  # -1 marks an empty slot in both
    among_T = np.where(same_TK, top_logprobs_TK, -np.inf).max(axis=1)
    last_T = np.where(top_ids_TK >= 0, top_logprobs_TK, np.inf).min(axis=1)
    with np.errstate(invalid="ignore"):  # inf - inf
        off_T = np.where(same_TK.any(axis=1), np.abs(logprobs_T - among_T), logprobs_T - last_T)
    wrong = ((off_T > TOLERANCE) & (ids_T >= 0)).nonzero()[0]
    if len(wrong):
        at = int(wrong[0])
        among = f"{among_T[at]:.4g} among its likeliest" if same_TK[at].any() else "and does not name it"
        raise StageError(
            f"score: the teacher {teacher} gives token {ids_T[at]} of {_place(items, at)} the log-probability "
            f"{logprobs_T[at]:.4g} where it was asked about it, {among}, of which the last has {last_T[at]:.4g} "
            f"({len(wrong)} of {len(ids_T)} tokens): these are not the scores of the tokens that it was asked about"
        )


def _check_mass(teacher: str, items: Sequence[ScoredRollout], top_logprobs_TK: np.ndarray) -> None:
    """The likeliest tokens of a row hold a mass of at most 1."""
    mass_T = np.exp(top_logprobs_TK.astype(np.float64)).sum(axis=1)
    wrong = (mass_T > 1.0 + TOLERANCE).nonzero()[0]
    if len(wrong):
        at = int(wrong[0])
        raise StageError(
            f"score: the teacher {teacher} gives the likeliest tokens at {_place(items, at)} a mass of "
            f"{mass_T[at]:.4g} ({len(wrong)} of {len(mass_T)} tokens): these are no log-probabilities"
        )


def flat_scores(teacher: str, items: Sequence[ScoredRollout], vocabulary: Vocabulary) -> str:
    """What is wrong where the scores say the same of every token; empty where some row prefers one token to another.

    The stop event, which may be several ids, is not compared. Of a few tokens it may be chance, so a teacher is refused
    where this is so of all of a step.
    """
    top_ids_TK = np.concatenate([item.scores.top_ids for item in items])
    top_logprobs_TK = np.concatenate([item.scores.top_logprobs for item in items])
    single_TK = (top_ids_TK >= 0) & (top_ids_TK != vocabulary.stop_event)
    highest_T = np.where(single_TK, top_logprobs_TK, -np.inf).max(axis=1)
    lowest_T = np.where(single_TK, top_logprobs_TK, np.inf).min(axis=1)
    if (single_TK.sum(axis=1) < 2).any() or (highest_T - lowest_T >= FLAT).any():
        return ""
    return (
        f"score: the teacher {teacher} gives every token the same log-probability, {highest_T[0]:.4g}; of a "
        f"vocabulary of {vocabulary.size} that is nothing learnt (-log V = {-np.log(vocabulary.size):.4g}): its "
        "weights are not those of a trained model"
    )


def _place(items: Sequence[ScoredRollout], token: int) -> str:
    """Whose token this is, counted over all rollouts."""
    ends = np.cumsum([len(item.rollout) for item in items])
    number = int(np.searchsorted(ends, token, side="right"))
    rollout = items[number].rollout
    position = token - int(ends[number]) + len(rollout)
    return f"place {position} of answer {rollout.sample} to {rollout.prompt.source}, row {rollout.prompt.index + 1},"
