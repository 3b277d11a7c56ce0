"""A rollout's candidates on their way from the engine that named them to the one that scores them.

They are most of a rollout's bytes, and the driver has no use for them: it passes on where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from opsd.engines.protocols import Request
from opsd.types import Prompt, Rollout, Trajectory

Candidates = tuple[np.ndarray, np.ndarray]  # candidate_ids and candidate_logprobs of a rollout


class Away(NamedTuple):
    """Where the candidates of a rollout are."""

    group: Any  # a reference to the candidates of several rollouts, or its number among those beside
    number: int  # of the rollout among them


class Written(NamedTuple):
    """What an engine tells of an answer to who knows the prompt."""

    response_ids: np.ndarray
    sampled_logprobs: np.ndarray
    stopped: bool
    policy_version: int
    token_versions: np.ndarray | None
    trajectory: Trajectory | None


def taken_out(group: dict[int, Rollout]) -> tuple[dict[int, Written], list[Candidates]]:
    """The answers without their candidates, and these, in the same order."""
    candidates = [(rollout.candidate_ids, rollout.candidate_logprobs) for rollout in group.values()]
    written = {
        place: Written(r.response_ids, r.sampled_logprobs, r.stopped, r.policy_version, r.token_versions, r.trajectory)
        for place, r in group.items()
    }
    return written, candidates


def away(group: dict[int, Written], requests: Sequence[Request], candidates: Any) -> dict[int, Rollout]:
    """The rollouts, which know where their candidates are. `candidates`: a reference to what `taken_out` gave."""
    return {
        place: Rollout(
            prompt=_without_row(requests[place][0]),
            sample=requests[place][1],
            candidate_ids=np.empty((len(written.response_ids), 0), np.int32),
            candidate_logprobs=np.empty((len(written.response_ids), 0), np.float32),
            candidates=Away(candidates, number),
            **written._asdict(),
        )
        for number, (place, written) in enumerate(group.items())
    }


def _without_row(prompt: Prompt) -> Prompt:
    """The tools alone read it, and they have had it."""
    return prompt if prompt.row is None else replace(prompt, row=None)


def with_references(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], list[Any]]:
    """The rollouts as they travel, and the references to what they need beside: they name these by number."""
    groups = list(dict.fromkeys(r.candidates.group for r in rollouts if r.candidates is not None))
    number = {group: place for place, group in enumerate(groups)}
    named = [
        r if r.candidates is None else replace(r, candidates=Away(number[r.candidates.group], r.candidates.number))
        for r in rollouts
    ]
    return named, groups


def put_back(rollouts: Sequence[Rollout], groups: Sequence[Sequence[Candidates]]) -> list[Rollout]:
    """The whole rollouts. `groups`: what the references of `with_references` stand for."""
    return [rollout if rollout.candidates is None else _whole(rollout, groups) for rollout in rollouts]


def _whole(rollout: Rollout, groups: Sequence[Sequence[Candidates]]) -> Rollout:
    ids, logprobs = groups[rollout.candidates.group][rollout.candidates.number]
    return replace(rollout, candidate_ids=ids, candidate_logprobs=logprobs, candidates=None)
