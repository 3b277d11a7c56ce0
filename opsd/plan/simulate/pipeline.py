"""A run as a discrete-event model: rollout, scoring, learning and weight sync."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial

from opsd.engines.groups import TokensInFlight, split_evenly
from opsd.plan.simulate.clock import Clock
from opsd.plan.simulate.parts import Layout, Outcome, Rates, Work
from opsd.plan.simulate.services import Answer, Requests, RolloutEngine, ScoringEngine

ROLES = ("rollout", "teacher", "learner")


def simulate(work: Work, rates: Rates, layout: Layout) -> Outcome:
    """All of `work`, from first answers to the last update. Its first and last steps, in which a pipeline fills and
    drains, do not count; `work` must have more than 3 x max_staleness + 1 steps."""
    run = Pipeline(work, rates, layout)
    run.begin()
    return run.outcome()


class Pipeline:
    """The loop: a step's answers may begin when at most `max_staleness` updates are missing to be on-policy."""

    def __init__(self, work: Work, rates: Rates, layout: Layout) -> None:
        self.work, self.rates, self.layout = work, rates, layout
        self.clock = Clock(layout.num_devices)
        split, parts = layout.split, (self.clock, rates, layout, work.prompt_tokens)
        self.engines = [RolloutEngine(*parts, self._hand_over) for _ in range(split.rollout)]
        self.scorers = [ScoringEngine(*parts, partial(self._scored, number)) for number in range(split.teacher)]
        self.scored_in_flight = TokensInFlight(split.teacher)
        self.num_rolled: Counter[int] = Counter()
        self.num_scored: Counter[int] = Counter()
        self.updates = 0
        self.learner_works = False
        # By step: seconds since the beginning.
        self.rolled_s: dict[int, float] = {}
        self.scored_s: dict[int, float] = {}
        self.selected_s: dict[int, float] = {}
        self.learned_s: dict[int, float] = {}
        self.synced_s: dict[int, float] = {-1: 0.0}
        self.worked_s: dict[int, defaultdict[str, float]] = {}  # at the step's update

    def begin(self) -> None:
        """Runs to the end."""
        for step in range(self.layout.max_staleness + 1):
            self._release(step)
        self.clock.run()
        assert self.updates == self.work.num_steps, f"stopped after {self.updates} of {self.work.num_steps} steps"

    def _release(self, step: int) -> None:
        if step >= self.work.num_steps:
            return
        answers = [Answer(step, tokens) for tokens in self.work.lengths[step].tolist()]
        if self.layout.dispatch == "pulled":
            shared = Requests(answers, len(self.engines))
            for engine in self.engines:
                engine.give(shared)
        else:
            for engine, part in zip(self.engines, split_evenly(answers, len(self.engines)), strict=True):
                engine.give(Requests(list(part), 1))

    def _hand_over(self, answers: list[Answer]) -> None:
        step = answers[0].step
        self.num_rolled[step] += len(answers)
        if self.num_rolled[step] == self.work.num_answers:
            self.rolled_s[step] = self.clock.now
        parts = self.scored_in_flight.split([self._num_read(answer) for answer in answers])
        for scorer, part in zip(self.scorers, parts, strict=True):
            scorer.give([answers[index] for index in part])

    def _num_read(self, answer: Answer) -> int:
        return self.work.prompt_tokens + answer.tokens

    def _scored(self, scorer: int, answers: list[Answer]) -> None:
        self.scored_in_flight.done(scorer, sum(map(self._num_read, answers)))
        for answer in answers:
            self.num_scored[answer.step] += 1
            if self.num_scored[answer.step] == self.work.num_answers:
                self.scored_s[answer.step] = self.clock.now
        if not self.learner_works:
            self._learn()

    def _learn(self) -> None:
        """The next step, if its batch is whole."""
        self.learner_works = self.updates in self.scored_s
        if self.learner_works:
            self.clock.start(self.rates.select_s, self._selected, role="driver")

    def _selected(self) -> None:
        self.selected_s[self.updates] = self.clock.now
        ranks, lengths = self.layout.split.learner, self.work.lengths[self.updates]
        tokens = float(lengths.sum()) + len(lengths) * self.work.prompt_tokens
        seconds = self.rates.learn_s(tokens, self.work.kept_ratio, ranks)
        self.clock.start(seconds, self._learned, role="learner", workers=ranks)

    def _learned(self) -> None:
        """New weights: the learner waits while they go out, and computes nothing."""
        step = self.updates
        self.learned_s[step] = self.clock.now
        self.worked_s[step] = self.clock.worked_s.copy()
        self.updates += 1
        for engine in self.engines:
            engine.give(None)
        self._release(step + self.layout.max_staleness + 1)
        ranks = self.layout.split.learner
        self.clock.start(self.rates.sync_s, self._synced, role="learner", workers=ranks, devices=0)

    def _synced(self) -> None:
        self.synced_s[self.updates - 1] = self.clock.now
        self._learn()

    def outcome(self) -> Outcome:
        """Between two updates of a run that has got going: as many as batches may be under way, or several times so
        many, since their updates may come together."""
        first, together = self.layout.max_staleness, self.layout.max_staleness + 1
        last = first + (self.work.num_steps - 1 - 2 * first) // together * together
        assert first < last, f"{self.work.num_steps} steps are too few for staleness {first}"
        seconds = self.learned_s[last] - self.learned_s[first]
        idle = {}
        for role in ROLES:
            worked_s = self.worked_s[last][role] - self.worked_s[first][role]
            idle[role] = max(0.0, 1 - worked_s / (seconds * getattr(self.layout.split, role)))
        return Outcome(
            seconds_per_step=seconds / (last - first),
            tokens_per_s=float(self.work.lengths[first + 1 : last + 1].sum()) / seconds,
            idle=idle,
            phase_s={} if self.layout.max_staleness else self._phases(),
        )

    def _phases(self) -> dict[str, float]:
        """Means over the steps, as the synchronous loop measures them."""
        steps = range(self.work.num_steps)
        ends = {
            "rollout": self.rolled_s,
            "score": self.scored_s,
            "select": self.selected_s,
            "learn": self.learned_s,
            "sync": self.synced_s,
        }
        began = {step: self.synced_s[step - 1] for step in steps}
        phase_s = {}
        for name, ended in ends.items():
            phase_s[name] = sum(ended[step] - began[step] for step in steps) / len(steps)
            began = ended
        return phase_s
