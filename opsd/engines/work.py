"""Requests that engines take as they get free, so that who has short answers does the work of who has long ones.

What every engine can run at once is dealt at the start, in even parts. Where there is more, it waits in a queue that
all engines take from. An answer is seeded by its request, so it does not matter who makes it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray

from opsd.engines.groups import split_evenly
from opsd.engines.protocols import Engine, Request
from opsd.engines.sampling import Sampling
from opsd.types import Rollout


class Work:
    """One engine's requests, by their places among all; it takes them in order."""

    waited_s = 0.0  # that the engine has had nothing to do, for this work alone

    def __init__(self, requests: Mapping[int, Request]) -> None:
        self._waiting = deque(requests.items())

    def made_by(
        self, engine: Engine, sampling: Sampling, policy_version: int, group_size: int | None
    ) -> Iterator[dict[int, Rollout]]:
        """The rollouts by place, as Engine.generate."""
        return engine.generate(self, sampling, policy_version, group_size)

    @property
    def more(self) -> bool:
        """Whether `take` may have something."""
        return bool(self._waiting)

    def take(self, room: int, tokens_in_flight: int) -> dict[int, Request]:
        """At most `room` more. `tokens_in_flight`: of what the engine has under way, see `size_of`."""
        return dict(self._waiting.popleft() for _ in range(min(room, len(self._waiting))))


class SharedWork(Work):
    """An engine's own requests first, then those of a queue that other engines take from, too.

    An engine has one request more than it has begun, so that it need not wait for the queue when an answer ends.
    """

    def __init__(
        self,
        requests: Mapping[int, Request],
        others: ray.ObjectRef,
        queue: Any,
        *,
        job: int,
        engine: int,
        max_tokens: int,
    ) -> None:
        """`others`: the requests of the queue, by place. `engine`: this one's number, for the queue. `max_tokens`: of
        an answer."""
        super().__init__(requests)
        self._others, self._queue, self._job, self._engine = others, queue, job, engine
        self._max_tokens = max_tokens
        self._read: Mapping[int, Request] | None = None  # `others`, where they were needed: to read them takes its time
        self._asked: ray.ObjectRef | None = None  # the queue's answer, on its way
        self._asked_with = 0  # tokens that were this engine's when it asked
        self._had_its_share_at: float = math.inf  # tokens that were this engine's when the queue last gave nothing
        self._is_open = True

    @property
    def more(self) -> bool:
        return bool(self._waiting) or self._is_open

    def take(self, room: int, tokens_in_flight: int) -> dict[int, Request]:
        """As Work.take. An engine that has something to do goes on with it while the queue is asked."""
        if self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            self._hear()
        given = super().take(room, tokens_in_flight)
        while True:
            self._ask(room - len(given), tokens_in_flight + self._size(given))
            if tokens_in_flight or self._asked is None or len(given) == room:
                return given
            self._hear()
            given |= super().take(room - len(given), tokens_in_flight)

    def _ask(self, room: int, tokens: int) -> None:
        """Where it makes sense to. `tokens`: of all that is this engine's."""
        if self._is_open and not self._waiting and self._asked is None and tokens < self._had_its_share_at:
            self._asked = self._queue.take.remote(self._job, self._engine, max(1, room), tokens)
            self._asked_with = tokens

    def _hear(self) -> None:
        (places, self._is_open), self._asked = ray.get(self._asked), None
        self._had_its_share_at = math.inf if places else self._asked_with
        if self._read is None:
            self._read = ray.get(self._others)
        self._waiting.extend((place, self._read[place]) for place in places)

    def _size(self, requests: Mapping[int, Request]) -> int:
        return sum(size_of(request, self._max_tokens) for request in requests.values())


def as_work(requests: Sequence[Request] | Work) -> Work:
    return requests if isinstance(requests, Work) else Work(dict(enumerate(requests)))


def size_of(request: Request, max_tokens: int) -> int:
    """Tokens that a request may come to: how long its answer will be, nobody knows."""
    return len(request[0].token_ids) + room_of(request, max_tokens)


def room_of(request: Request, max_tokens: int) -> int:
    """Tokens that its answer may have."""
    own = request[0].max_response_tokens
    return max_tokens if own is None else min(own, max_tokens)


def deal(sizes: Sequence[int], num_engines: int, room: int) -> tuple[list[list[int]], list[int]]:
    """(places that are each engine's own; places of the queue), of requests of these sizes.

    Where all can begin, or one engine has them all, in order: an engine has what stands together. Else the largest
    first.
    """
    if num_engines == 1 or len(sizes) <= num_engines * room:
        return [list(part) for part in split_evenly(range(len(sizes)), num_engines)], []
    order = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    begun = num_engines * room
    return [order[engine:begun:num_engines] for engine in range(num_engines)], order[begun:]
