"""A teacher behind servers elsewhere: an actor asks them and keeps what they answer with, as one of an engine does."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from logging.handlers import QueueHandler
from queue import SimpleQueue
from typing import Any, Protocol

import ray

from opsd.cluster.placement import Placement
from opsd.cluster.ray import gather
from opsd.config.engine import EngineSpec, TeacherConfig
from opsd.engines.candidates import Candidates, put_back
from opsd.engines.payload import PartUnderWay
from opsd.engines.pool import EnginePool
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.engines.work import Work
from opsd.errors import StageError, WorkerLost
from opsd.ops.signals import Statistics
from opsd.payload.keeper import Keeper, Told
from opsd.payload.whole import own_scores, wholes
from opsd.teacher.remote.client import ServedSpec, token_of
from opsd.teacher.remote.http import HttpClient, served_info
from opsd.teacher.remote.openai import OpenAIClient, served_model
from opsd.types import NoScores, Rollout, TeacherScores

SOON_S = 1.0  # after which the terminal has what a client warns of while it is waited for


class Client(Protocol):
    """What asks the servers of one teacher. StageError where these are lost, or answer nothing that is asked."""

    async def score(self, rollouts: Sequence[Rollout], top_k: int) -> Sequence[TeacherScores | NoScores]:
        """In order, once all are there; NoScores for a rollout that the servers fail on."""
        ...

    def generate(self, requests: Mapping[int, Request], sampling: Sampling) -> AsyncIterator[dict[int, Rollout]]:
        """A rollout for each request, by its place, as they finish. A teacher's answers have no policy version."""
        ...


CLIENTS: dict[str, Callable[[ServedSpec], Client]] = {"http": HttpClient, "openai": OpenAIClient}
# What all servers say of themselves: waits for them, and raises ConfigError.
SERVED: dict[str, Callable[[TeacherConfig], dict[str, Any]]] = {"http": served_info, "openai": served_model}


def served_spec(spec: EngineSpec[TeacherConfig]) -> ServedSpec:
    """What the client is made of, in one process without a GPU: waits for the servers. Raises ConfigError."""
    cfg = spec.config
    one = {"config": replace(cfg, num_workers=1), "device": "cpu"}
    return ServedSpec(**{**vars(spec), **one}, served=SERVED[cfg.backend](cfg), token=token_of(cfg.http))


class ClientWorker(Keeper):
    """Takes an EngineWorker's place in an EnginePool. Any number of its calls may wait for the servers at one time.

    It tells of no seconds at work: servers may work for others.
    """

    def __init__(self) -> None:
        super().__init__()
        self._warnings: SimpleQueue[logging.LogRecord] = SimpleQueue()

    def start(self, spec: ServedSpec) -> None:
        self.name, self.vocabulary = spec.config.where, spec.vocabulary
        self.client = CLIENTS[spec.config.backend](spec)
        logging.getLogger("opsd").addHandler(QueueHandler(self._warnings))

    async def generate(
        self, work: Work, sampling: Sampling, policy_version: int, group_size: int | None, apart: bool
    ) -> AsyncIterator[tuple[dict[int, Rollout], float]]:
        """As EngineWorker.generate, of all of the work at once."""
        async for group in self.client.generate(work.take(sys.maxsize, 0), sampling):
            yield group, 0.0

    async def score(
        self,
        key: int,
        rollouts: list[Rollout],
        top_k: int,
        statistics: Statistics | None,
        *candidates: list[Candidates],
    ) -> float:
        """As EngineWorker.score."""
        rollouts = put_back(rollouts, candidates)
        scores = own_scores(rollouts, await self.client.score(wholes(rollouts), top_k))
        self.keep(key, self.name, rollouts, scores, self.vocabulary, statistics)
        return 0.0

    def warnings(self) -> list[logging.LogRecord]:
        """What was warned of since the last call: nobody sees an actor's terminal."""
        return [self._warnings.get_nowait() for _ in range(self._warnings.qsize())]


class ServedTeacher(EnginePool):
    """The servers of a teacher, as an EnginePool of one worker; what it warns of is said by this process."""

    worker_class = ClientWorker

    def __init__(
        self, role: str, spec: EngineSpec[TeacherConfig], placement: Placement | None = None, *, keeps_payload: bool
    ) -> None:
        """Waits for the servers. Raises ConfigError."""
        super().__init__(role, served_spec(spec), placement, keeps_payload=keeps_payload)
        self.path = spec.config.where

    def generate(self, *asked: Any, **options: Any) -> Iterator[dict[int, Rollout]]:
        yield from super().generate(*asked, **options)
        self._pass_on()

    def scores(self, parts: list[PartUnderWay]) -> list[Told]:
        refs = [part.busy_s for part in parts]
        while refs and ray.wait(refs, num_returns=len(refs), timeout=SOON_S, fetch_local=False)[1]:
            if not self._pass_on():
                break
        try:
            told = super().scores(parts)
        except StageError:
            self._pass_on()
            raise
        self._pass_on()
        return told

    def _pass_on(self) -> bool:
        """The worker's warnings, to the terminal; False where it does not answer, which who needs it will say."""
        try:
            [warnings] = gather("score", [self.workers[0].warnings.remote()])
        except WorkerLost:
            return False
        for record in warnings:
            logging.getLogger(record.name).handle(record)
        return True
