"""The payload that an engine's actor keeps, as the driver sees it: it asks for kept rows and never holds one."""
# N kept tokens

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import ObjectRef
from ray.actor import ActorHandle

from opsd.cluster.ray import gather
from opsd.engines.worker import PAYLOAD_CALLS
from opsd.ops.signals import Statistics
from opsd.payload.kept import Wanted
from opsd.payload.scored import ScoredBatch
from opsd.types import Rollout


@dataclass(frozen=True, kw_only=True)
class KeptByWorker:
    """A Payload in the process of a worker."""

    worker: ActorHandle
    key: int

    def rows(self, places: Sequence[np.ndarray], wanted: Wanted) -> Sequence[Any]:
        """An object for each rank, which goes to it without passing the driver."""
        found = self._ask("rows", places, wanted, num_returns=len(places))
        return found if len(places) > 1 else [found]

    def close(self, index_N: np.ndarray) -> Callable[[], dict[str, float]]:
        asked = self._ask("close", index_N)
        return lambda: gather("learn", [asked])[0]

    def whole(self) -> ScoredBatch:
        return gather("score", [self._ask("whole")])[0]

    def drop(self) -> None:
        self._ask("drop")

    def _ask(self, method: str, *arguments: Any, num_returns: int = 1) -> Any:
        call = getattr(self.worker, method).options(concurrency_group=PAYLOAD_CALLS, num_returns=num_returns)
        return call.remote(self.key, *arguments)


@dataclass(frozen=True, kw_only=True)
class PartUnderWay:
    """Rollouts that one engine is scoring."""

    rollouts: Sequence[Rollout]
    top_k: int
    statistics: Statistics | None
    engine: int  # its number
    life: int  # see EngineActors
    key: int  # by which it knows them
    busy_s: ObjectRef  # the engine's seconds at work, once they are scored

    @property
    def num_rollouts(self) -> int:
        return len(self.rollouts)
