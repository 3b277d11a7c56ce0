"""Engines behind one object: work goes out in even parts, results come back as they are ready."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import ray

from opsd.cluster.placement import Placement
from opsd.cluster.ray import gather, no_answer, patience, start_actor
from opsd.config.engine import EngineSpec
from opsd.engines.groups import split_evenly
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import engine_environment
from opsd.engines.worker import EngineWorker
from opsd.errors import StageError
from opsd.types import Prompt, Rollout, TeacherScores


class EnginePool:
    """Ray actors that hold the same model. `role` names them on the dashboard and in errors."""

    def __init__(self, role: str, spec: EngineSpec, placement: Placement | None = None) -> None:
        """`placement`: which nodes and GPUs the engines get; None: wherever Ray finds some."""
        self.role = role
        self.path = spec.path
        config = spec.config
        num_gpus = config.tensor_parallel_size if spec.device == "cuda" else 0
        seats = placement.seats(role, config.num_workers, num_gpus) if placement else [None] * config.num_workers
        environment = engine_environment(config, spec.device)
        self.workers = [
            start_actor(EngineWorker, f"{role}-{index}", num_gpus=num_gpus, environment=environment, seat=seat)
            for index, seat in enumerate(seats)
        ]
        spec = replace(spec, path=os.path.abspath(spec.path))  # an actor's working folder is its node's
        self._starting = [worker.start.remote(spec) for worker in self.workers]

    def wait_ready(self) -> None:
        gather(f"{self.role} start", self._starting)

    def generate(
        self, requests: list[Request], sampling: Sampling, policy_version: int, group_size: int | None = None
    ) -> Iterator[dict[int, Rollout]]:
        """Rollouts by their places in `requests`; a group as soon as it is there.

        `group_size`: rollouts that an engine hands over together, at least; None: all of its own. Raises StageError
        where a log-probability is NaN.
        """
        streams, num_given = {}, 0  # the engine's number and the place of its first request
        for number, part in enumerate(split_evenly(requests, len(self.workers))):
            generate = self.workers[number].generate.options(num_returns="streaming")
            stream = generate.remote(part, sampling, policy_version, group_size)
            streams[stream] = number, num_given
            num_given += len(part)
        while streams:
            ready, waiting = ray.wait(list(streams), num_returns=1, timeout=patience["answer_s"])
            if not ready:
                raise no_answer(f"{self.role}: worker {streams[waiting[0]][0]}")
            [stream] = ready
            number, first_place = streams[stream]
            try:
                [group] = gather(self.role, [next(stream)], first=number)
            except StopIteration:
                del streams[stream]
            else:
                require_numbers(f"{self.role}: worker {number}, {self.path}", group.values())
                yield {first_place + place: rollout for place, rollout in group.items()}

    def score(self, rollouts: list[Rollout], top_k: int) -> list[ray.ObjectRef]:
        """References to lists of TeacherScores: one after another they answer `rollouts` in order. Does not wait."""
        parts = split_evenly(rollouts, len(self.workers))
        return [worker.score.remote(part, top_k) for worker, part in zip(self.workers, parts, strict=True) if part]

    def are_scored(self, refs: list[ray.ObjectRef]) -> bool:
        """Whether all of these are there. Does not wait."""
        return not refs or not ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[1]

    def scores(self, refs: list[ray.ObjectRef]) -> list[TeacherScores]:
        """What these references, from `score`, stand for: waits for all."""
        return [scores for part in gather("score", refs) for scores in part]

    def close(self) -> None:
        """Ends the actors, and with them the engines' memory."""
        for worker in self.workers:
            ray.kill(worker)

    def update_weights(self, weights: ray.ObjectRef, policy_version: int) -> None:
        """The same weights into every engine; returns when all of them run on these."""
        gather("sync", [worker.update_weights.remote(weights, policy_version) for worker in self.workers])

    def expect_weights(self) -> None:
        """Weights are about to come another way."""
        gather("sync", [worker.expect_weights.remote() for worker in self.workers])

    def received_weights(self, policy_version: int) -> None:
        """Names the weights that came to the engines another way."""
        gather("sync", [worker.received_weights.remote(policy_version) for worker in self.workers])

    def sleep(self) -> None:
        """Free the engines' GPUs until their next call."""
        gather(self.role, [worker.sleep.remote() for worker in self.workers])


def require_numbers(who: str, rollouts: Iterable[Rollout]) -> None:
    """Raises StageError for an answer whose own log-probabilities are NaN: what it says was drawn from nothing."""
    for rollout in rollouts:
        if np.isnan(rollout.sampled_logprobs).any():
            raise StageError(
                f"{who}: the model's log-probabilities of its own answer to {rollout.prompt.source}, row "
                f"{rollout.prompt.index + 1}, are NaN (policy version {rollout.policy_version}): its weights are not "
                "finite, or its sums overflow in this dtype"
            )


def occurrences(prompts: Sequence[Prompt]) -> list[int]:
    """How often each prompt has stood before its place: 0 throughout, unless some are there twice."""
    seen: Counter[tuple[str, int]] = Counter()
    numbers = []
    for prompt in prompts:
        numbers.append(seen[prompt.source, prompt.index])
        seen[prompt.source, prompt.index] += 1
    return numbers


def sample_seed(run_seed: int, step: int, prompt: Prompt, sample: int, occurrence: int) -> int:
    """The seed of one answer of a step; `sample` counts those of one occurrence of the prompt in the step's batch."""
    key = (run_seed, step + 1, prompt.index, sample)
    return request_seed(*key, occurrence) if occurrence else request_seed(*key)


def request_seed(*key: int) -> int:
    """A 31-bit seed from whole numbers such as (run seed, step, prompt, sample): the same on any number of engines."""
    return int(np.random.SeedSequence(key).generate_state(1)[0] >> 1)
