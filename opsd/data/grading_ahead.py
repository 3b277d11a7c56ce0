"""Answers are graded while the teacher scores them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from opsd.data.grading import judge_rollouts
from opsd.data.math_process import Judgement
from opsd.types import Rollout


class GradingAhead:
    """Grades each group of answers as it passes, in a thread of its own, and says of each what came of it.

    A user's own grader is called in the thread that asks: it may set an alarm, which Python allows in the main thread
    alone.
    """

    def __init__(self, setting: str, tokenizer: Any) -> None:
        """`setting`: data.grader, not "none"."""
        self.setting, self.tokenizer = setting, tokenizer
        self._executor = ThreadPoolExecutor(1, "grading")
        # By the answer's id while it lives: the judgements of its group, and its place among them.
        self._begun: dict[int, tuple[Future[list[Judgement]], int]] = {}

    def passing(self, groups: Iterable[dict[int, Rollout]]) -> Iterator[dict[int, Rollout]]:
        """The groups as they are, each on its way to the grader."""
        for group in groups:
            if ":" not in self.setting:
                rollouts = list(group.values())
                begun = self._executor.submit(judge_rollouts, rollouts, self.setting, self.tokenizer)
                for place, rollout in enumerate(rollouts):
                    self._begun[id(rollout)] = begun, place
                    weakref.finalize(rollout, self._begun.pop, id(rollout), None)
            yield group

    def judgements(self, rollouts: Sequence[Rollout]) -> list[Judgement]:
        """What came of these. Waits for what is under way."""
        if not all(id(rollout) in self._begun for rollout in rollouts):
            return judge_rollouts(rollouts, self.setting, self.tokenizer)
        found = [self._begun[id(rollout)] for rollout in rollouts]
        return [begun.result()[place] for begun, place in found]

    def close(self) -> None:
        """Leaves what nobody has asked for."""
        self._executor.shutdown(wait=False, cancel_futures=True)
