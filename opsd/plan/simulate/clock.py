"""Simulated time: jobs that are under way at once share the devices."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(kw_only=True)
class Job:
    """Work under way."""

    ends_at: float  # of shared time
    then: Callable[[], None]
    role: str
    workers: int
    devices: int


class Clock:
    """A queue of jobs, each with what happens when it ends.

    A job takes its seconds where there are `num_devices` for all jobs that are under way; where there are fewer, all
    slow down alike: eight processes on two cores run at a quarter of their speed.

    Time runs twice. `now` is seconds; shared time, on which the jobs lie, passes by so much less as they slow down, so
    a job that began keeps its end on it whatever begins beside it.
    """

    def __init__(self, num_devices: float = math.inf) -> None:
        self.num_devices = num_devices
        self.now = 0.0
        self.working: Counter[str] = Counter()  # workers at work now, by role
        self.worked_s: defaultdict[str, float] = defaultdict(float)  # seconds of all its workers together, by role
        self._shared = 0.0
        self._devices = 0  # in use
        self._jobs: list[tuple[float, int, Job]] = []
        self._order = itertools.count()  # of jobs that end at the same time

    def start(
        self, seconds: float, then: Callable[[], None], *, role: str, workers: int = 1, devices: int | None = None
    ) -> None:
        """`workers` of `role` work for `seconds`, on as many devices (None) or `devices`; then `then` is called."""
        devices = workers if devices is None else devices
        job = Job(ends_at=self._shared + seconds, then=then, role=role, workers=workers, devices=devices)
        heapq.heappush(self._jobs, (job.ends_at, next(self._order), job))
        self._count(job, 1)

    def run(self) -> None:
        """Until no job is left."""
        while self._jobs:
            ends_at, _, job = heapq.heappop(self._jobs)
            seconds = (ends_at - self._shared) * max(1.0, self._devices / self.num_devices)
            for role, workers in self.working.items():
                self.worked_s[role] += workers * seconds
            self.now += seconds
            self._shared = ends_at
            self._count(job, -1)
            job.then()

    def _count(self, job: Job, sign: int) -> None:
        self.working[job.role] += sign * job.workers
        self._devices += sign * job.devices
