"""How long each role of a run waits: what says whether its machines are divided well."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence


class IdleTimer:
    """Seconds of each step in which a role's workers had nothing to do, on average over the role's workers."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._taken_at = clock()
        self._taken_s: dict[str, float] = {}

    def take(self, engines_s: Mapping[str, Sequence[float]], learner_s: float) -> dict[str, float]:
        """idle_s/ROLE since the last call.

        `engines_s`: by role, seconds at work of each of its engines since the start, as far as the driver has heard:
        they tell with their answers, so what is under way counts in the step in which it ends, and a step in which much
        of an earlier one ends shows 0. `learner_s`: the learner's since the last call.
        """
        now = self._clock()
        wall_s, self._taken_at = now - self._taken_at, now
        busy_s = {"learner": learner_s}
        for role, seconds in engines_s.items():
            mean_s = sum(seconds) / len(seconds)
            busy_s[role], self._taken_s[role] = mean_s - self._taken_s.get(role, 0.0), mean_s
        return {f"idle_s/{role}": max(0.0, wall_s - busy_s[role]) for role in sorted(busy_s)}
