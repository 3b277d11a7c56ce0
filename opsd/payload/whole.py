"""A trajectory on its way through a teacher: scored as one response; of the scores the student's own tokens stay."""
# T the student's tokens, R tokens of the whole response, C candidates

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np

from opsd.types import NoScores, Rollout, TeacherScores

Scores = TypeVar("Scores", TeacherScores, TeacherScores | NoScores)


def wholes(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """As whoever scores them reads them: of a trajectory tools' answers among the tokens, without candidates there."""
    return [rollout if rollout.trajectory is None else _whole(rollout) for rollout in rollouts]


def own_scores(rollouts: Sequence[Rollout], scores: Sequence[Scores]) -> list[Scores]:
    """Of the scores of `wholes` what is said of the student's own tokens."""
    return [
        found if rollout.trajectory is None or isinstance(found, NoScores) else _taken(found, rollout.place_T)
        for rollout, found in zip(rollouts, scores, strict=True)
    ]


def _whole(rollout: Rollout) -> Rollout:
    num_read, num_candidates = len(rollout.read_ids), rollout.candidate_ids.shape[1]
    sampled_R = np.zeros(num_read, np.float32)
    ids_RC = np.full((num_read, num_candidates), -1, np.int32)
    logprobs_RC = np.full((num_read, num_candidates), -np.inf, np.float32)
    sampled_R[rollout.place_T] = rollout.sampled_logprobs
    ids_RC[rollout.place_T], logprobs_RC[rollout.place_T] = rollout.candidate_ids, rollout.candidate_logprobs
    return replace(
        rollout,
        response_ids=rollout.read_ids,
        sampled_logprobs=sampled_R,
        candidate_ids=ids_RC,
        candidate_logprobs=logprobs_RC,
        trajectory=None,
        token_versions=None,
    )


def _taken(scores: TeacherScores, place_T: np.ndarray) -> TeacherScores:
    said: dict[str, Any] = {each.name: getattr(scores, each.name) for each in fields(scores)}
    own: dict[str, Any] = {name: None if column is None else column[place_T] for name, column in said.items()}
    return TeacherScores(**own)
