"""A teacher behind servers elsewhere, as a TeacherPool's engines: what they answer with is kept in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from opsd.cluster.ray import gather
from opsd.config.engine import EngineSpec, TeacherConfig
from opsd.engines.candidates import put_back, with_references
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.ops.signals import Statistics
from opsd.payload.keeper import KeptHere, Payload, ScoredPart, Told, looked_through
from opsd.payload.whole import own_scores, wholes
from opsd.teacher.remote.http import RemoteEngines
from opsd.teacher.remote.openai import OpenAIEngines
from opsd.types import NoScores, Rollout, TeacherScores


class Client(Protocol):
    """What asks the servers of one teacher."""

    def wait_ready(self) -> None: ...

    def generate(
        self, requests: list[Request], sampling: Sampling, policy_version: int
    ) -> Iterator[dict[int, Rollout]]: ...

    def score(self, rollouts: list[Rollout], top_k: int) -> list[Any]:
        """Requests under way, for the next two calls. Does not wait."""
        ...

    def are_scored(self, pending: list[Any]) -> bool: ...

    def scores(self, pending: list[Any]) -> Sequence[TeacherScores | NoScores]: ...


CLIENTS: dict[str, Callable[[EngineSpec[TeacherConfig]], Client]] = {"http": RemoteEngines, "openai": OpenAIEngines}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Rollouts that servers were asked about."""

    rollouts: Sequence[Rollout]
    pending: list[Any]
    statistics: Statistics | None = None

    @property
    def num_rollouts(self) -> int:
        return len(self.rollouts)


class ServedTeacher:
    """Takes an EnginePool's place in a TeacherPool."""

    def __init__(self, spec: EngineSpec[TeacherConfig]) -> None:
        self.spec = spec
        self.client = CLIENTS[spec.config.backend](spec)
        self.wait_ready, self.generate = self.client.wait_ready, self.client.generate

    def score(self, rollouts: list[Rollout], top_k: int, statistics: Statistics | None = None) -> list[Asked]:
        """As EnginePool.score."""
        rollouts, candidates = with_references(rollouts)
        rollouts = put_back(rollouts, gather("rollout", candidates))
        return [Asked(rollouts=rollouts, pending=self.client.score(wholes(rollouts), top_k), statistics=statistics)]

    def are_scored(self, parts: list[Asked]) -> bool:
        return all(self.client.are_scored(each.pending) for each in parts)

    def scores(self, parts: list[Asked]) -> list[Told]:
        """As EnginePool.scores."""
        return [Told([number], *self._scores(each)) for number, each in enumerate(parts)]

    def _scores(self, asked: Asked) -> tuple[ScoredPart, Payload | None]:
        scores, vocabulary = own_scores(asked.rollouts, self.client.scores(asked.pending)), self.spec.vocabulary
        teacher = ", ".join(self.spec.config.urls)
        part, scored = looked_through(teacher, asked.rollouts, scores, vocabulary, asked.statistics)
        return part, None if scored is None else KeptHere(scored, vocabulary)
