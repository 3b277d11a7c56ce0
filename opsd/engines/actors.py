"""The actors of a pool's engines: how they start, and what becomes of one that is lost."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace

import ray
from ray.actor import ActorHandle

from opsd.cluster.placement import Placement
from opsd.cluster.ray import gather, start_actor
from opsd.config.engine import EngineSpec
from opsd.engines.vllm import engine_environment
from opsd.engines.worker import PAYLOAD_CALLS, WEIGHT_CALLS
from opsd.errors import WorkerLost, say
from opsd.payload.keeper import Keeper


class EngineActors:
    """Actors that hold the same model, one after another by their numbers.

    One that is lost ends the attempt of the run, unless `restart_lost` has said that it may be started again.
    """

    def __init__(
        self,
        role: str,
        spec: EngineSpec,
        placement: Placement | None,
        *,
        keeps_payload: bool,
        worker_class: type[Keeper],
    ) -> None:
        config = spec.config
        self.role = role
        self._worker_class = worker_class
        self._num_gpus = config.tensor_parallel_size if spec.device == "cuda" else 0
        self._environment = engine_environment(config, spec.device)
        self._beside = {PAYLOAD_CALLS: 1} if keeps_payload else {WEIGHT_CALLS: 1} if spec.partial_rollouts else None
        self._spec = replace(spec, path=os.path.abspath(spec.path))  # an actor's working folder is its node's
        number = config.num_workers
        self._seats = placement.seats(role, number, self._num_gpus) if placement else [None] * number
        self.lives = [1] * number  # as which each is there
        self.policy_version = 0  # of the weights that they hold, or are about to
        self._may_restart = 0
        self._weights: Callable[[], ray.ObjectRef] | None = None
        self._replacing = threading.Lock()  # scores are waited for in one thread, and asked for in others
        self.workers = [self._actor(each, 1) for each in range(number)]
        self._starting = [worker.start.remote(self._spec) for worker in self.workers]

    def wait_ready(self) -> None:
        gather(f"{self.role} start", self._starting)

    def restart_lost(self, most: int, weights: Callable[[], ray.ObjectRef] | None) -> None:
        """From now on an engine that is lost is started again, `most` times in all.

        `weights`: a reference to those of `policy_version`, which it then gets; None: it has those of its folder.
        """
        self._may_restart, self._weights = most, weights

    @property
    def num_restarts(self) -> int:
        return sum(self.lives) - len(self.lives)

    def replace(self, number: int, life: int, lost: WorkerLost) -> None:
        """Engine `number`, which was there for the `life`-th time, is there again and ready; raises `lost` where that
        may not be."""
        with self._replacing:
            if self.lives[number] != life:
                return  # another thread has found it lost, too
            if self.num_restarts >= self._may_restart:
                raise lost
            times = f"{self.num_restarts + 1} of {self._may_restart}"
            say(f"engine  {self.role} {number} is started again ({times}): {lost}")
            ray.kill(self.workers[number])  # one that does not answer may still be there
            worker = self.workers[number] = self._actor(number, life + 1)
            self.lives[number] = life + 1  # last: who reads this, then the worker, takes no dead one for new
            gather(f"{self.role} start", [worker.start.remote(self._spec)], workers=[number])
            if self._weights is not None:
                newest = worker.update_weights.remote(self._weights(), self.policy_version)
                gather("sync", [newest], workers=[number])

    def _actor(self, number: int, life: int) -> ActorHandle:
        return start_actor(
            self._worker_class,
            f"{self.role}-{number}" if life == 1 else f"{self.role}-{number}-life-{life}",
            num_gpus=self._num_gpus,
            environment=self._environment,
            seat=self._seats[number],
            beside=self._beside,
        )
