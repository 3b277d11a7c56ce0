"""A step's rollouts on their way through the teacher: made when the step comes, or some steps ahead of it.

Every engine does what it is given in the order in which it is given it. So the order of the driver's calls, weights of
step s before the answers of step s + n, is all that says which weights make which answers: always those of n steps
before, whatever takes how long. A seeded run on a CPU is the same each time, for every n. Not so where engines take new
weights in mid-answer (schedule.partial_rollouts): then it says how old they are at most.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from opsd.batch import PendingScores
from opsd.data.prompts import PromptSource
from opsd.types import Rollout

JOIN_S = 10.0  # for a thread whose engines are gone


class RolloutsAhead:
    """Gives each step, in order, the rollouts that were begun for it."""

    def __init__(
        self,
        prompts: PromptSource,
        sample: Callable[..., Iterable[dict[int, Rollout]]],
        begin: Callable[[Iterable[dict[int, Rollout]]], list[PendingScores]],
        *,
        samples_per_prompt: int,
        first_step: int,
        last_step: int,
        max_staleness: int,
    ) -> None:
        """`sample`: a RolloutSource, whose engines begin when it is called. `begin`: hands groups to the teacher as
        they come. No step from `last_step` on is begun.
        """
        self.prompts, self.sample, self.begin = prompts, sample, begin
        self.samples_per_prompt, self.last_step, self.max_staleness = samples_per_prompt, last_step, max_staleness
        self._next = first_step
        self._positions: dict[int, int] = {}  # of the prompts, before each step that was begun and not yet taken
        self._begun: dict[int, Future[list[PendingScores]]] = {}
        self._threads: list[threading.Thread] = []

    def take(self, step: int) -> list[PendingScores]:
        """The rollouts of this step, all made and all with the teacher; those of the steps after it are begun first."""
        while self._next <= min(step + self.max_staleness, self.last_step - 1):
            self._start(self._next)
            self._next += 1
        pending = self._begun.pop(step).result()
        self._positions.pop(step)
        return pending

    def position_before(self, step: int) -> int:
        """Where the prompts of this step begin: what is begun and not learnt from is begun again after a resume."""
        return self._positions.get(step, self.prompts.position)

    def num_begun(self) -> int:
        """Steps whose rollouts are made or in the making, and that nothing has learnt from."""
        return len(self._begun)

    def close(self, end_engines: Callable[[], None]) -> None:
        """Leaves what is in the making. `end_engines`: called where a thread still waits for them."""
        if any(thread.is_alive() for thread in self._threads):
            end_engines()
        for thread in self._threads:
            thread.join(JOIN_S)

    def _start(self, step: int) -> None:
        self._positions[step] = self.prompts.position
        groups = self.sample(self.prompts.next_batch(), samples_per_prompt=self.samples_per_prompt, step=step)
        begun = self._begun[step] = Future()
        if not self.max_staleness:  # in this thread, where Ctrl-C arrives
            begun.set_result(self.begin(groups))
            return

        def hand_over() -> None:
            try:
                begun.set_result(self.begin(groups))
            except BaseException as error:  # whatever it is, the step that waits for it raises it
                begun.set_exception(error)

        thread = threading.Thread(target=hand_over, name=f"rollouts of step {step + 1}", daemon=True)
        self._threads = [*(thread for thread in self._threads if thread.is_alive()), thread]
        thread.start()
