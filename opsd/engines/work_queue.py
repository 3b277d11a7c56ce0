"""The queue of requests that the engines of a pool share, a Ray actor of its own: see opsd.engines.work."""

from __future__ import annotations

from collections import deque


class WorkQueue:
    """Knows requests by their places and sizes alone, so its process loads no torch."""

    def __init__(self, num_engines: int) -> None:
        self.num_engines = num_engines
        self.jobs: dict[int, deque[tuple[int, int]]] = {}  # (place, tokens) of what nobody has taken
        self.in_flight: dict[int, list[int]] = {}  # tokens that each engine has under way, as far as it has told

    def begin(self, job: int, waiting: list[tuple[int, int]], in_flight: list[int]) -> None:
        self.jobs[job], self.in_flight[job] = deque(waiting), in_flight

    def take(self, job: int, engine: int, room: int, tokens_in_flight: int) -> tuple[list[int], bool]:
        """The places of the next requests, and whether there are more.

        At most `room`, and no more than leave the engine with an even share of all that is not done: the last ones go
        to who has least. An engine with nothing to do gets at least one.
        """
        waiting = self.jobs.get(job)
        if waiting is None:
            return [], False
        in_flight = self.in_flight[job]
        places: list[int] = []
        in_flight[engine] = tokens_in_flight
        share = (sum(in_flight) + sum(tokens for _, tokens in waiting)) / self.num_engines
        while waiting and len(places) < room and in_flight[engine] < share:
            place, tokens = waiting.popleft()
            in_flight[engine] += tokens
            places.append(place)
        if not waiting:
            del self.jobs[job], self.in_flight[job]
        return places, bool(waiting)
