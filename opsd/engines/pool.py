"""Engines behind one object: work goes out in even parts, results come back in order."""

from __future__ import annotations

import numpy as np
import ray

from opsd.config import EngineConfig
from opsd.engines.vllm_engine import engine_environment
from opsd.engines.worker import EngineWorker
from opsd.placement import gather, split_evenly, start_actor
from opsd.types import Prompt, Rollout, Sampling, TeacherScores, Vocabulary


class EnginePool:
    """Ray actors that hold the same model. `role` names them on the dashboard and in errors."""

    def __init__(
        self,
        role: str,
        path: str,
        config: EngineConfig,
        *,
        vocabulary: Vocabulary,
        device: str,
        max_model_tokens: int,
        trust_remote_code: bool,
        max_batch_tokens: int | None = None,
    ) -> None:
        self.role = role
        num_gpus = config.tensor_parallel_size if device == "cuda" else 0
        environment = engine_environment(device, config.cpu_threads)
        self.workers = [
            start_actor(EngineWorker, f"{role}-{index}", num_gpus=num_gpus, environment=environment)
            for index in range(config.num_workers)
        ]
        self._starting = [
            worker.start.remote(
                path=path,
                config=config,
                vocabulary=vocabulary,
                device=device,
                max_model_tokens=max_model_tokens,
                trust_remote_code=trust_remote_code,
                max_batch_tokens=max_batch_tokens,
            )
            for worker in self.workers
        ]

    def wait_ready(self) -> None:
        gather(f"{self.role} start", self._starting)

    def generate(
        self, requests: list[tuple[Prompt, int, int]], sampling: Sampling, policy_version: int
    ) -> list[Rollout]:
        """Rollouts in the order of `requests`, each a (prompt, sample number, seed)."""
        refs = []
        for worker, part in zip(self.workers, split_evenly(requests, len(self.workers)), strict=True):
            prompts, samples, seeds = ([request[i] for request in part] for i in range(3))
            refs.append(worker.generate.remote(prompts, samples, seeds, sampling, policy_version))
        return [rollout for part in gather(self.role, refs) for rollout in part]

    def score(self, rollouts: list[Rollout], top_k: int) -> list[TeacherScores]:
        """One TeacherScores a rollout, in order."""
        parts = split_evenly(rollouts, len(self.workers))
        refs = [worker.score.remote(part, top_k) for worker, part in zip(self.workers, parts, strict=True)]
        return [scores for part in gather(self.role, refs) for scores in part]

    def update_weights(self, weights: ray.ObjectRef, policy_version: int) -> None:
        """The same weights into every engine; returns when all of them run on these."""
        gather("sync", [worker.update_weights.remote(weights, policy_version) for worker in self.workers])


def request_seed(*key: int) -> int:
    """A 31-bit seed from whole numbers such as (run seed, step, prompt, sample): the same on any number of engines."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)
