"""What is known of a rollout's tokens beside themselves: a sequence mixed in, tools' answers between, their weights."""
# T the student's tokens, R tokens of the whole response, P prompt tokens

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opsd.errors import expect_shape

ENDS = ("answered", "max_turns", "cut", "no_room", "tool")  # see Trajectory.end


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A second sequence, whose input embeddings are mixed into a rollout's, position by position."""

    other_ids: np.ndarray  # int32 [P + T]; where that sequence has ended, the rollout's own ids
    own_share: float  # [0, 1], of the rollout's own embeddings


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Turns of the student's with tools' answers between them. Nothing is known of a tool's tokens but their ids.

    A rollout's tokens, and all that is said of them, are the student's own T; only the sequence has the others, too.
    """

    read_ids: np.ndarray  # int32 [R], the whole response, from the student's first token to its last
    place_T: np.ndarray  # int64 [T], ascending: where in it the student's tokens stand; from 0 to R - 1
    turn_starts: tuple[int, ...]  # the first of each turn's tokens among the T
    end: str  # answered: no call | max_turns | cut: in a turn | no_room: for a tool's answer | tool: it said so
    num_calls: int = 0  # that were answered, malformed ones among them
    failures: Mapping[str, int] = field(default_factory=dict)  # of these, by opsd.agents.tools.FAILURES

    def __post_init__(self) -> None:
        place_T, num_read = self.place_T, len(self.read_ids)
        if len(place_T) == 0 or (place_T[0], place_T[-1]) != (0, num_read - 1) or (np.diff(place_T) < 1).any():
            raise ValueError(f"place_T must ascend from 0 to {num_read - 1}, got {place_T}")
        if self.end not in ENDS:
            raise ValueError(f"end must be one of {', '.join(ENDS)}, got {self.end!r}")

    @property
    def num_turns(self) -> int:
        return len(self.turn_starts)


def expect_beside(num_prompt: int, num_tokens: int, mixture: Mixture | None, trajectory: Trajectory | None) -> None:
    """Raises ValueError where one of these is not of a rollout of so many prompt and response tokens."""
    if mixture is not None:
        expect_shape("mixture.other_ids", mixture.other_ids, (num_prompt + num_tokens,))
    if trajectory is not None:
        expect_shape("trajectory.place_T", trajectory.place_T, (num_tokens,))


def version_fields(version_T: np.ndarray) -> dict[str, Any]:
    """The fields of a Rollout that say which weights drew its tokens. int32 [T], ascending, of each token."""
    oldest, newest = int(version_T[0]), int(version_T[-1])
    return {"policy_version": oldest, "token_versions": None if oldest == newest else version_T}


def expect_versions(token_versions: np.ndarray | None, oldest: int, num_tokens: int) -> None:
    """Raises ValueError where these cannot be the policy versions of so many tokens, drawn one after another."""
    if token_versions is None:
        return
    expect_shape("token_versions", token_versions, (num_tokens,))
    if token_versions[0] != oldest or (np.diff(token_versions) < 0).any():
        raise ValueError(f"token_versions must ascend from policy_version={oldest}, got {token_versions}")
