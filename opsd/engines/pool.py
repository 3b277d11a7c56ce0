"""Engines behind one object: they take work as they get free, and results come back as they are ready."""

from __future__ import annotations

import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from opsd.cluster.placement import Placement
from opsd.cluster.ray import gather, no_answer, patience, start_actor
from opsd.config.engine import EngineSpec
from opsd.engines.candidates import away, with_references
from opsd.engines.groups import split_evenly
from opsd.engines.payload import KeptByWorker, PartUnderWay
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import engine_environment
from opsd.engines.work import SharedWork, Work, deal, size_of
from opsd.engines.work_queue import WorkQueue
from opsd.engines.worker import PAYLOAD_CALLS, EngineWorker
from opsd.errors import StageError
from opsd.ops.signals import Statistics
from opsd.payload.keeper import Told
from opsd.types import Prompt, Rollout


class EnginePool:
    """Ray actors that hold the same model. `role` names them on the dashboard and in errors."""

    worker_class: type[EngineWorker] = EngineWorker  # a benchmark puts one with a stand-in for the model here

    def __init__(
        self, role: str, spec: EngineSpec, placement: Placement | None = None, *, keeps_payload: bool = False
    ) -> None:
        """`placement`: which nodes and GPUs the engines get; None: wherever Ray finds some. `keeps_payload`: they
        `score`, and are asked for what they keep while they go on.
        """
        self.role = role
        self.path = spec.path
        config = spec.config
        num_gpus = config.tensor_parallel_size if spec.device == "cuda" else 0
        seats = placement.seats(role, config.num_workers, num_gpus) if placement else [None] * config.num_workers
        environment = engine_environment(config, spec.device)
        beside = {PAYLOAD_CALLS: 1} if keeps_payload else None
        self.workers = [
            start_actor(
                self.worker_class,
                f"{role}-{index}",
                num_gpus=num_gpus,
                environment=environment,
                seat=seat,
                beside=beside,
            )
            for index, seat in enumerate(seats)
        ]
        spec = replace(spec, path=os.path.abspath(spec.path))  # an actor's working folder is its node's
        self._starting = [worker.start.remote(spec) for worker in self.workers]
        self.max_num_seqs = config.max_num_seqs
        self.busy_s = [0.0] * len(self.workers)  # of each engine at work, as far as it has told
        self._queue: Any = None  # made where the first work needs it
        self._jobs = itertools.count()
        self._keys = itertools.count()  # of payloads that the engines keep
        self._updates: deque[list[ray.ObjectRef]] = deque()  # weights on their way in, the oldest first

    def wait_ready(self) -> None:
        gather(f"{self.role} start", self._starting)

    def generate(
        self,
        requests: list[Request],
        sampling: Sampling,
        policy_version: int,
        group_size: int | None = None,
        *,
        apart: bool = False,
        wrap: Callable[[Work], Work] | None = None,
    ) -> Iterator[dict[int, Rollout]]:
        """Rollouts by their places in `requests`; a group as soon as it is there. The engines begin at once.

        `group_size`: rollouts that an engine hands over together, at least; None: all of its own. `apart`: their
        candidates stay in the object store, for the engines that score them. `wrap`: what becomes of an engine's
        work. The iterator raises StageError where a log-probability is NaN.
        """
        streams = {}
        for number, work in enumerate(self._deal(requests, sampling.max_tokens)):
            if work.more:
                generate = self.workers[number].generate.options(num_returns="streaming")
                work = work if wrap is None else wrap(work)
                streams[generate.remote(work, sampling, policy_version, group_size, apart)] = number
        return self._groups(streams, requests if apart else None)

    def _deal(self, requests: list[Request], max_tokens: int) -> list[Work]:
        """The work of each engine."""
        sizes = [size_of(request, max_tokens) for request in requests]
        begun, waiting = deal(sizes, len(self.workers), self.max_num_seqs)
        if not waiting:
            return [Work({place: requests[place] for place in part}) for part in begun]
        if self._queue is None:
            self._queue = start_actor(
                WorkQueue, f"{self.role}-queue", len(self.workers), num_gpus=0, environment={"CUDA_VISIBLE_DEVICES": ""}
            )
        job = next(self._jobs)
        in_flight = [sum(sizes[place] for place in part) for part in begun]
        gather(self.role, [self._queue.begin.remote(job, [(place, sizes[place]) for place in waiting], in_flight)])
        others = ray.put({place: requests[place] for place in waiting})
        return [
            SharedWork(
                {place: requests[place] for place in part},
                others,
                self._queue,
                job=job,
                engine=engine,
                max_tokens=max_tokens,
            )
            for engine, part in enumerate(begun)
        ]

    def _groups(self, streams: dict[Any, int], apart: list[Request] | None) -> Iterator[dict[int, Rollout]]:
        """What comes out of these streams, each with the number of its engine. `apart`: the requests, see `away`."""
        while streams:
            ready, waiting = ray.wait(list(streams), num_returns=1, timeout=patience["answer_s"])
            if not ready:
                raise no_answer(f"{self.role}: worker {streams[waiting[0]]}")
            [stream] = ready
            number = streams[stream]
            try:
                [(group, busy_s)] = gather(self.role, [next(stream)], first=number)
            except StopIteration:
                del streams[stream]
            else:
                self.busy_s[number] = busy_s
                rollouts = group if apart is None else away(group, apart, next(stream))
                require_numbers(f"{self.role}: worker {number}, {self.path}", rollouts.values())
                yield rollouts

    def score(self, rollouts: list[Rollout], top_k: int, statistics: Statistics | None = None) -> list[PartUnderWay]:
        """Parts that one after another answer `rollouts` in order, for the next two calls. Does not wait.

        `statistics`: what is told of each token beside the fields of TokenStats.
        """
        parts = []
        for number, own in enumerate(split_evenly(rollouts, len(self.workers))):
            if own:
                key, (named, candidates) = next(self._keys), with_references(own)
                busy_s = self.workers[number].score.remote(key, named, top_k, statistics, *candidates)
                parts.append(PartUnderWay(num_rollouts=len(own), engine=number, key=key, busy_s=busy_s))
        return parts

    def are_scored(self, parts: list[PartUnderWay]) -> bool:
        """Whether all of these are there. Does not wait."""
        refs = [each.busy_s for each in parts]
        return not refs or not ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[1]

    def scores(self, parts: list[PartUnderWay]) -> list[Told]:
        """What each engine says of its parts, and where their payload is: waits for all."""
        own: dict[int, list[int]] = {}  # by engine, the numbers of its parts
        for number, (each, busy_s) in enumerate(
            zip(parts, gather("score", [each.busy_s for each in parts]), strict=True)
        ):
            self.busy_s[each.engine] = max(self.busy_s[each.engine], busy_s)
            own.setdefault(each.engine, []).append(number)
        asked = [
            self.workers[engine].told.options(concurrency_group=PAYLOAD_CALLS).remote([parts[n].key for n in numbers])
            for engine, numbers in own.items()
        ]
        return [
            Told(numbers, part, KeptByWorker(worker=self.workers[engine], key=parts[numbers[0]].key))
            for (engine, numbers), part in zip(own.items(), gather("score", asked), strict=True)
        ]

    def close(self) -> None:
        """Ends the actors, and with them the engines' memory."""
        for actor in [*self.workers, *filter(None, [self._queue])]:
            ray.kill(actor)

    def update_weights(self, weights: ray.ObjectRef, policy_version: int, *, pending: int = 0) -> None:
        """The same weights into every engine, each after what it was given to do before.

        `pending`: so many updates may be on their way when this returns. What goes wrong with one is raised when it is
        waited for.
        """
        self._updates.append([worker.update_weights.remote(weights, policy_version) for worker in self.workers])
        while len(self._updates) > pending:
            gather("sync", self._updates.popleft())

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
