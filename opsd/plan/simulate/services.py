"""Engines that answer prompts and engines that score answers, on a simulated clock."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from opsd.plan.simulate.clock import Clock
from opsd.plan.simulate.parts import Layout, Rates


class Answer(NamedTuple):
    """A request and, once it is generated, its answer."""

    step: int
    tokens: int  # of the response


class Requests:
    """Requests of a step that wait for one engine (dealt) or for all of them (pulled)."""

    def __init__(self, answers: list[Answer], num_engines: int) -> None:
        self.num_engines = num_engines
        self.waiting = deque(answers)
        self.running = 0  # in these engines together

    def take(self, room: int, running: int) -> list[Answer]:
        """What an engine with `running` sequences and `room` for more takes: no more than makes the engines level."""
        level = -(-(len(self.waiting) + self.running) // self.num_engines)
        taken = [self.waiting.popleft() for _ in range(min(room, level - running, len(self.waiting)))]
        self.running += len(taken)
        return taken


class RolloutEngine:
    """Does what it is given in the order in which it is given it: a step's requests, new weights.

    Continuous batching within a step: what is taken is prefilled while decoding waits, then all sequences decode
    together. Between two ends of answers all decode steps take equally long, so that time passes in one jump.
    """

    def __init__(
        self,
        clock: Clock,
        rates: Rates,
        layout: Layout,
        prompt_tokens: int,
        hand_over: Callable[[list[Answer]], None],
    ) -> None:
        self.clock, self.rates, self.layout = clock, rates, layout
        self.prompt_tokens = prompt_tokens
        self.hand_over = hand_over
        self.inbox: deque[Requests | None] = deque()  # None: weights
        self.requests: Requests | None = None  # at which it is
        self.decoded = 0.0  # steps since the engine began
        self.running: list[tuple[float, int, Answer]] = []  # a heap; first the decode step at which an answer ends
        self.finished: list[Answer] = []  # not handed over yet
        self.works = False
        self._order = itertools.count()

    def give(self, work: Requests | None) -> None:
        """Requests, or new weights (None)."""
        self.inbox.append(work)
        if not self.works:
            self._go_on()

    def _go_on(self) -> None:
        """Starts what comes next, if anything does."""
        self.works = True
        while True:
            if self.requests is not None:
                new = self.requests.take(self.layout.max_num_seqs - len(self.running), len(self.running))
                if new:
                    self._prefill(new)
                    return
                if self.running:
                    self.clock.start(self._seconds_to_next_end(), self._end_answers, role="rollout")
                    return
                self.requests = None
            elif not self.inbox:
                self.works = False
                return
            elif (work := self.inbox.popleft()) is None:
                self.clock.start(self.rates.sync_s, self._go_on, role="rollout")
                return
            else:
                self.requests = work

    def _prefill(self, answers: list[Answer]) -> None:
        for answer in answers:
            heapq.heappush(self.running, (self.decoded + answer.tokens, next(self._order), answer))
        seconds = len(answers) * self.prompt_tokens / self.rates.prefill_tokens_per_s
        self.clock.start(seconds, self._go_on, role="rollout")

    def _seconds_to_next_end(self) -> float:
        step_s = self.rates.decode_step_s + self.rates.decode_sequence_s * len(self.running)
        return (self.running[0][0] - self.decoded) * step_s

    def _end_answers(self) -> None:
        assert self.requests is not None, "an engine decodes a step's requests"
        self.decoded = self.running[0][0]
        while self.running and self.running[0][0] <= self.decoded:
            self.finished.append(heapq.heappop(self.running)[2])
            self.requests.running -= 1
        step_is_done = not self.running and not self.requests.waiting
        group: list[Answer] = []
        if len(self.finished) >= self.layout.group_size or step_is_done:
            group, self.finished = self.finished, []
        self._go_on()
        if group:
            self.hand_over(group)


class ScoringEngine:
    """Scores what it is given, in batches of at most `max_batch_tokens` tokens; a longer answer goes alone."""

    def __init__(
        self,
        clock: Clock,
        rates: Rates,
        layout: Layout,
        prompt_tokens: int,
        done: Callable[[list[Answer]], None],
    ) -> None:
        self.clock, self.rates, self.layout = clock, rates, layout
        self.prompt_tokens = prompt_tokens
        self.done = done
        self.waiting: deque[Answer] = deque()
        self.works = False

    def give(self, answers: list[Answer]) -> None:
        self.waiting.extend(answers)
        if not self.works:
            self._go_on()

    def _go_on(self) -> None:
        batch: list[Answer] = []
        tokens = 0
        while self.waiting:
            more = self.waiting[0].tokens + self.prompt_tokens
            if batch and tokens + more > self.layout.max_batch_tokens:
                break
            batch.append(self.waiting.popleft())
            tokens += more
        self.works = bool(batch)
        if batch:
            seconds = self.rates.score_batch_s + tokens / self.rates.score_tokens_per_s
            self.clock.start(seconds, lambda: self._end(batch), role="teacher")

    def _end(self, batch: list[Answer]) -> None:
        self._go_on()
        self.done(batch)
