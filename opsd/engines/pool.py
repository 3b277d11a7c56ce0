"""Engines behind one object: they take work as they get free, and results come back as they are ready."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from opsd.cluster.placement import Placement
from opsd.cluster.ray import gather, no_answer, patience, start_actor
from opsd.config.engine import EngineSpec
from opsd.engines.actors import EngineActors
from opsd.engines.candidates import away, with_references
from opsd.engines.groups import TokensInFlight, num_read
from opsd.engines.payload import KeptByWorker, PartUnderWay
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.engines.work import SharedWork, Work, deal, size_of
from opsd.engines.work_queue import WorkQueue
from opsd.engines.worker import PAYLOAD_CALLS, WEIGHT_CALLS, EngineWorker
from opsd.errors import StageError, WorkerLost
from opsd.ops.signals import Statistics
from opsd.payload.keeper import Keeper, Told
from opsd.types import Prompt, Rollout


class EnginePool:
    """Ray actors that hold the same model. `role` names them on the dashboard and in errors."""

    worker_class: type[Keeper] = EngineWorker  # a benchmark puts one with a stand-in for the model here

    def __init__(
        self, role: str, spec: EngineSpec, placement: Placement | None = None, *, keeps_payload: bool = False
    ) -> None:
        """`placement`: which nodes and GPUs the engines get; None: wherever Ray finds some. `keeps_payload`: they
        `score`, and are asked for what they keep while they go on.
        """
        self.role = role
        self.path = spec.path
        self.actors = EngineActors(role, spec, placement, keeps_payload=keeps_payload, worker_class=self.worker_class)
        self.max_num_seqs = spec.config.max_num_seqs
        self.partial_rollouts = spec.partial_rollouts
        self.busy_s = [0.0] * len(self.workers)  # of each engine at work, as far as it has told
        self._busy_before = [0.0] * len(self.workers)  # in earlier lives
        self._in_flight = TokensInFlight(len(self.workers))  # of what is scored
        self._queue: Any = None  # made where the first work needs it
        self._jobs = itertools.count()
        self._keys = itertools.count()  # of payloads that the engines keep
        self._updates: deque[list[ray.ObjectRef]] = deque()  # weights on their way in, the oldest first

    @property
    def workers(self) -> list[ActorHandle]:
        return self.actors.workers

    def wait_ready(self) -> None:
        self.actors.wait_ready()

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
        give = partial(
            self._give,
            sampling=sampling,
            policy_version=policy_version,
            group_size=group_size,
            apart=apart,
            wrap=wrap,
        )
        deal_out = partial(self._deal, max_tokens=sampling.max_tokens)
        return self._groups(give(deal_out(dict(enumerate(requests)))), requests, give, deal_out, apart)

    def _give(
        self,
        work: dict[int, Work],
        *,
        sampling: Sampling,
        policy_version: int,
        group_size: int | None,
        apart: bool,
        wrap: Callable[[Work], Work] | None,
    ) -> dict[Any, tuple[int, int, Work]]:
        """Engines, by number, begin with their work: streams of groups, each with the engine, its life and its work."""
        streams = {}
        for number, own in work.items():
            life = self.actors.lives[number]
            generate = self.workers[number].generate.options(num_returns="streaming")
            made = own if wrap is None else wrap(own)
            streams[generate.remote(made, sampling, policy_version, group_size, apart)] = number, life, own
        return streams

    def _deal(self, requests: dict[int, Request], max_tokens: int) -> dict[int, Work]:
        """The work of each engine, by its number. `requests`: by place."""
        places, sizes = list(requests), [size_of(request, max_tokens) for request in requests.values()]
        begun, waiting = deal(sizes, len(self.workers), self.max_num_seqs)
        own = [{places[n]: requests[places[n]] for n in part} for part in begun]
        if not waiting:
            return {number: Work(each) for number, each in enumerate(own) if each}
        if self._queue is None:
            self._queue = start_actor(
                WorkQueue, f"{self.role}-queue", len(self.workers), num_gpus=0, environment={"CUDA_VISIBLE_DEVICES": ""}
            )
        job = next(self._jobs)
        in_flight = [sum(sizes[n] for n in part) for part in begun]
        gather(self.role, [self._queue.begin.remote(job, [(places[n], sizes[n]) for n in waiting], in_flight)])
        others = ray.put({places[n]: requests[places[n]] for n in waiting})
        return {
            number: SharedWork(each, others, self._queue, job=job, engine=number, max_tokens=max_tokens)
            for number, each in enumerate(own)
        }

    def _groups(
        self,
        streams: dict[Any, tuple[int, int, Work]],
        requests: list[Request],
        give: Callable[[dict[int, Work]], dict[Any, tuple[int, int, Work]]],
        deal_out: Callable[[dict[int, Request]], dict[int, Work]],
        apart: bool,
    ) -> Iterator[dict[int, Rollout]]:
        """What comes out of these streams.

        An engine that was lost has its own work again, whole: so its batches, and with them the rounding of its sums,
        are those that they would have been. Work that it took from a queue is shared out anew when the others are done.
        """
        unanswered, owed = set(range(len(requests))), False
        while streams:
            ready, waiting = ray.wait(list(streams), num_returns=1, timeout=patience["answer_s"])
            [stream] = ready or waiting[:1]
            number, life, work = streams[stream]
            try:
                if not ready:
                    raise no_answer(f"{self.role}: worker {number}")
                [(group, busy_s)] = gather(self.role, [next(stream)], workers=[number])
                rollouts = away(group, requests, next(stream)) if apart else group
            except StopIteration:
                del streams[stream]
            except WorkerLost as lost:
                del streams[stream]
                self._replace(number, life, lost)
                if isinstance(work, SharedWork):
                    owed = True
                else:
                    streams |= give({number: work})
            else:
                self._has_told(number, busy_s)
                rollouts = {place: rollout for place, rollout in rollouts.items() if place in unanswered}
                unanswered -= rollouts.keys()
                require_numbers(f"{self.role}: worker {number}, {self.path}", rollouts.values())
                if rollouts:
                    yield rollouts
            if not streams and owed:
                streams, owed = give(deal_out({place: requests[place] for place in sorted(unanswered)})), False

    def _replace(self, number: int, life: int, lost: WorkerLost) -> None:
        """See EngineActors.replace."""
        self.actors.replace(number, life, lost)
        self._busy_before[number] = self.busy_s[number]

    def _has_told(self, number: int, busy_s: float) -> None:
        """`busy_s`: seconds at work in this life, as an answer says, perhaps not the newest."""
        self.busy_s[number] = max(self.busy_s[number], self._busy_before[number] + busy_s)

    def score(self, rollouts: list[Rollout], top_k: int, statistics: Statistics | None = None) -> list[PartUnderWay]:
        """Parts that one after another answer `rollouts` in order, for the next two calls. Does not wait.

        `statistics`: what is told of each token beside the fields of TokenStats.
        """
        split = self._in_flight.split([num_read(rollout) for rollout in rollouts])
        return [
            self._scored_by(number, rollouts[own.start : own.stop], top_k, statistics)
            for number, own in enumerate(split)
            if own
        ]

    def _scored_by(
        self, number: int, rollouts: Sequence[Rollout], top_k: int, statistics: Statistics | None
    ) -> PartUnderWay:
        key, (named, candidates), life = next(self._keys), with_references(rollouts), self.actors.lives[number]
        busy_s = self.workers[number].score.remote(key, named, top_k, statistics, *candidates)
        return PartUnderWay(
            rollouts=rollouts, top_k=top_k, statistics=statistics, engine=number, life=life, key=key, busy_s=busy_s
        )

    def are_scored(self, parts: list[PartUnderWay]) -> bool:
        """Whether all of these are there. Does not wait."""
        refs = [each.busy_s for each in parts]
        return not refs or not ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[1]

    def scores(self, parts: list[PartUnderWay]) -> list[Told]:
        """What each engine says of its parts, and where their payload is: waits for all."""
        own: dict[int, list[int]] = {}  # by engine, the numbers of its parts
        for number, each in enumerate(parts):
            own.setdefault(each.engine, []).append(number)
            self._in_flight.done(each.engine, sum(map(num_read, each.rollouts)))
        return [self._told(engine, numbers, [parts[n] for n in numbers]) for engine, numbers in own.items()]

    def _told(self, engine: int, numbers: list[int], parts: list[PartUnderWay]) -> Told:
        """What an engine says of its parts, all in one. One that was lost scores them again in its next life."""
        while True:
            life = self.actors.lives[engine]
            parts = [p if p.life == life else self._scored_by(engine, p.rollouts, p.top_k, p.statistics) for p in parts]
            worker = self.workers[engine]
            try:
                self._has_told(engine, max(gather("score", [p.busy_s for p in parts], workers=[engine] * len(parts))))
                told = worker.told.options(concurrency_group=PAYLOAD_CALLS).remote([p.key for p in parts])
                [part] = gather("score", [told], workers=[engine])
            except WorkerLost as lost:
                self._replace(engine, life, lost)
            else:
                return Told(numbers, part, KeptByWorker(worker=worker, key=parts[0].key))

    def close(self) -> None:
        """Ends the actors, and with them the engines' memory."""
        for actor in [*self.workers, *filter(None, [self._queue])]:
            ray.kill(actor)

    def update_weights(self, weights: ray.ObjectRef, policy_version: int, *, pending: int = 0) -> None:
        """The same weights into every engine, each after what it was given to do before. One that is lost gets its own,
        see EngineActors.

        `pending`: so many updates may be on their way when this returns. What goes wrong with one is raised when it is
        waited for. With `spec.partial_rollouts` none is: they are beside each engine, which takes them in after its
        next step, and whose answers raise what goes wrong.
        """
        self.actors.policy_version = policy_version
        calls = [worker.update_weights for worker in self.workers]
        if self.partial_rollouts:
            calls = [worker.leave_weights.options(concurrency_group=WEIGHT_CALLS) for worker in self.workers]
            pending = 0  # what an engine is asked next may not begin before the weights are there
        self._updates.append([call.remote(weights, policy_version) for call in calls])
        while len(self._updates) > pending:
            lives, refs = list(self.actors.lives), self._updates.popleft()
            for number, ref in enumerate(refs):
                try:
                    gather("sync", [ref], workers=[number])
                except WorkerLost as lost:
                    self._replace(number, lives[number], lost)

    def expect_weights(self) -> None:
        """Weights are about to come another way."""
        gather("sync", [worker.expect_weights.remote() for worker in self.workers])

    def received_weights(self, policy_version: int) -> None:
        """Names the weights that came to the engines another way."""
        self.actors.policy_version = policy_version
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
