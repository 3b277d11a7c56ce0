"""Engines that answer prompts and engines that score answers, on a simulated clock."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

from opsd.plan.simulate.clock import Clock, Job
from opsd.plan.simulate.parts import Layout, Rates


class Answer(NamedTuple):
    """A request and, once it is generated, its answer."""

    step: int
    tokens: int  # of the response


class Prompts:
    """Requests that wait for one engine (dealt) or for all of them (pulled)."""

    def __init__(self, num_engines: int) -> None:
        self.num_engines = num_engines
        self.waiting: deque[Answer] = deque()
        self.running = 0  # in these engines together

    def take(self, room: int, running: int) -> list[Answer]:
        """What an engine with `running` sequences and `room` for more takes: no more than makes the engines level."""
        level = -(-(len(self.waiting) + self.running) // self.num_engines)
        taken = [self.waiting.popleft() for _ in range(min(room, level - running, len(self.waiting)))]
        self.running += len(taken)
        return taken


class RolloutEngine:
    """Continuous batching: what arrives is prefilled while decoding waits, then all sequences decode together.

    Between two ends of answers all decode steps take equally long, so that time passes in one jump. New weights go in
    when nothing runs: an engine that waits for them takes no request.
    """

    def __init__(
        self,
        clock: Clock,
        rates: Rates,
        layout: Layout,
        prompts: Prompts,
        prompt_tokens: int,
        hand_over: Callable[[list[Answer]], None],
    ) -> None:
        self.clock, self.rates, self.layout, self.prompts = clock, rates, layout, prompts
        self.prompt_tokens = prompt_tokens
        self.hand_over = hand_over
        self.decoded = 0.0  # steps since the engine began
        self.running: list[tuple[float, int, Answer]] = []  # a heap; first the decode step at which an answer ends
        self.of_step: Counter[int] = Counter()  # running answers
        self.finished: dict[int, list[Answer]] = defaultdict(list)  # by step, not handed over yet
        self.weights_waiting = False
        self.job: Job | None = None
        self.decodes = False  # what `job` does
        self._order = itertools.count()

    def wake(self) -> None:
        """There may be new requests: an engine that decodes and has room takes them in between two steps."""
        if self.job is None:
            self._go_on()
        elif self.decodes and self.prompts.waiting and self._room() and not self.weights_waiting:
            left_s = self.clock.cancel(self.job)
            self.decoded = self.running[0][0] - left_s / self._step_s()
            self._go_on()

    def new_weights(self) -> None:
        self.weights_waiting = True
        if self.job is None:
            self._go_on()

    def _go_on(self) -> None:
        """Starts what comes next, if anything does."""
        self.job, self.decodes = None, False
        if self.weights_waiting and not self.running:
            self.weights_waiting = False
            self.job = self.clock.start(self.rates.sync_s, self._go_on, role="rollout")
            return
        new = [] if self.weights_waiting else self.prompts.take(self._room(), len(self.running))
        if new:
            for answer in new:
                heapq.heappush(self.running, (self.decoded + answer.tokens, next(self._order), answer))
                self.of_step[answer.step] += 1
            prefill_s = len(new) * self.prompt_tokens / self.rates.prefill_tokens_per_s
            self.job = self.clock.start(prefill_s, self._go_on, role="rollout")
        elif self.running:
            seconds = (self.running[0][0] - self.decoded) * self._step_s()
            self.job = self.clock.start(seconds, self._end_answers, role="rollout")
            self.decodes = True

    def _end_answers(self) -> None:
        self.decoded = self.running[0][0]
        while self.running and self.running[0][0] <= self.decoded:
            _, _, answer = heapq.heappop(self.running)
            self.of_step[answer.step] -= 1
            self.prompts.running -= 1
            self.finished[answer.step].append(answer)
        self._go_on()
        for step in list(self.finished):
            if len(self.finished[step]) >= self.layout.group_size or not self.of_step[step]:
                self.hand_over(self.finished.pop(step))

    def _room(self) -> int:
        return self.layout.max_num_seqs - len(self.running)

    def _step_s(self) -> float:
        return self.rates.decode_step_s + self.rates.decode_sequence_s * len(self.running)


class Answers:
    """What waits for one teacher engine (dealt) or for all of them (pulled) to be scored."""

    def __init__(self, num_engines: int) -> None:
        self.idle = num_engines
        self.waiting: deque[Answer] = deque()

    def take(self, max_tokens: int, prompt_tokens: int) -> tuple[list[Answer], int]:
        """A batch for an idle engine and its tokens; a longer answer goes alone. Other idle engines get as many."""
        batch: list[Answer] = []
        tokens = 0
        for _ in range(-(-len(self.waiting) // self.idle)):
            more = self.waiting[0].tokens + prompt_tokens
            if batch and tokens + more > max_tokens:
                break
            batch.append(self.waiting.popleft())
            tokens += more
        return batch, tokens


class ScoringEngine:
    """Scores what waits for it, batch by batch."""

    def __init__(
        self,
        clock: Clock,
        rates: Rates,
        layout: Layout,
        answers: Answers,
        prompt_tokens: int,
        done: Callable[[list[Answer]], None],
    ) -> None:
        self.clock, self.rates, self.layout, self.answers = clock, rates, layout, answers
        self.prompt_tokens = prompt_tokens
        self.done = done
        self.works = False

    def wake(self) -> None:
        if self.works:
            return
        batch, tokens = self.answers.take(self.layout.max_batch_tokens, self.prompt_tokens)
        if batch:
            self.works = True
            self.answers.idle -= 1
            seconds = self.rates.score_batch_s + tokens / self.rates.score_tokens_per_s
            self.clock.start(seconds, lambda: self._end(batch), role="teacher")

    def _end(self, batch: list[Answer]) -> None:
        self.works = False
        self.answers.idle += 1
        self.wake()
        self.done(batch)
