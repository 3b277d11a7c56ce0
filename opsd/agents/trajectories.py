"""Rollouts with tools as an engine's work: a turn is a request, the next one another once its tools have answered.

The engine never waits for a tool while it has other work. Nothing is tokenised again: what was sampled stays as it is,
and only tools' answers, with what the chat template puts around them, are tokenised.
"""
# T tokens of the student's in a trajectory, C candidates

from __future__ import annotations

import itertools
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from opsd.agents.calls import Malformed
from opsd.agents.toolbox import AgentSpec, Toolbox, end_toolbox, toolbox_of
from opsd.agents.tools import Answered, ToolCall
from opsd.engines.pool import request_seed
from opsd.engines.protocols import Engine, Request
from opsd.engines.sampling import Sampling
from opsd.engines.work import Work
from opsd.sequences import version_fields
from opsd.types import Rollout, Trajectory

OPEN_PER_SLOT = 2  # trajectories for each sequence that an engine runs at once, where tools.max_open says nothing

_numbers = itertools.count()  # of the trajectories of this process: their keys


@dataclass
class _Open:
    """A trajectory under way."""

    request: Request
    key: int
    turns: list[Rollout] = field(default_factory=list)
    pieces: list[np.ndarray] = field(default_factory=list)  # of the response: turns, and between them tools' answers
    failures: Counter[str] = field(default_factory=Counter)
    num_calls: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.pieces))

    def next_turn(self, room: int) -> Request:
        """`room`: tokens of the whole response."""
        prompt, sample, seed = self.request
        ids = np.concatenate([prompt.token_ids, *self.pieces])
        own = replace(prompt, token_ids=ids, max_response_tokens=room - self.num_tokens, row=None)
        return own, sample, request_seed(seed, len(self.turns))

    def rollout(self, end: str) -> Rollout:
        """All turns as one: what stands behind the last of them nobody has read."""
        pieces = self.pieces if len(self.pieces) % 2 else self.pieces[:-1]
        first = np.cumsum([0, *map(len, pieces)])[:-1][::2]  # of each turn, in the response
        lengths = [len(turn) for turn in self.turns]
        columns = ("response_ids", "sampled_logprobs", "candidate_ids", "candidate_logprobs")
        return replace(
            self.turns[-1],
            prompt=self.request[0],
            **version_fields(np.concatenate([turn.version_T for turn in self.turns])),
            **{name: np.concatenate([getattr(turn, name) for turn in self.turns]) for name in columns},
            trajectory=Trajectory(
                read_ids=np.concatenate(pieces),
                place_T=np.concatenate([np.arange(a, a + n) for a, n in zip(first, lengths, strict=True)]),
                turn_starts=tuple(np.cumsum([0, *lengths])[:-1].tolist()),
                end=end,
                num_calls=self.num_calls,
                failures=dict(self.failures),
            ),
        )


class AgentWork(Work):
    """Around an engine's work, whose requests become trajectories. It travels to the engine before it begins."""

    def __init__(self, work: Work, agents: AgentSpec, *, keeps_tools: bool = True) -> None:
        """`keeps_tools`: their processes stay for the engine's next work."""
        self._work, self._agents, self._keeps_tools = work, agents, keeps_tools

    def made_by(
        self, engine: Engine, sampling: Sampling, policy_version: int, group_size: int | None
    ) -> Iterator[dict[int, Rollout]]:
        """As Work.made_by: a group is of trajectories that were begun one after another, whichever ends first."""
        self._begin(self.toolbox(), sampling.max_tokens)
        self._max_open = self._tools.max_open or OPEN_PER_SLOT * engine.max_num_seqs
        try:
            for turns in engine.generate(self, sampling, policy_version, group_size=1):
                for place, turn in turns.items():
                    self._hear(place, turn)
                while group_size is not None and all(place in self._ended for place in self._order[:group_size]):
                    if len(self._order) < group_size:
                        break
                    yield self._group(group_size)
            if self._order:
                yield self._group(len(self._order))
        finally:
            for place in list(self._open):
                self._tools.runner.close_trajectory(self._open.pop(place).key)
            if not self._keeps_tools:
                end_toolbox(self._agents)

    def toolbox(self) -> Toolbox:
        return toolbox_of(self._agents)

    def _begin(self, tools: Toolbox, room: int) -> None:
        self._tools, self._room = tools, room
        self._open: dict[int, _Open] = {}
        self._ready: deque[int] = deque()  # whose next turn can begin
        self._calling: dict[int, Future[list[Answered]]] = {}
        self._answered: queue.SimpleQueue[int] = queue.SimpleQueue()  # of these whose tools have answered
        self._order: list[int] = []  # places as they were begun, of what was not yielded
        self._ended: dict[int, Rollout] = {}

    @property
    def more(self) -> bool:
        return bool(self._ready) or bool(self._calling) or self._work.more

    def take(self, room: int, tokens_in_flight: int) -> dict[int, Request]:
        """As Work.take: next turns first, then new trajectories, as many as may be open. Waits for a tool only where
        the engine has nothing else."""
        while True:
            self._listen()
            places = [self._ready.popleft() for _ in range(min(room, len(self._ready)))]
            given = {place: self._open[place].next_turn(self._room) for place in places}
            begin = min(room - len(given), self._max_open - len(self._open))
            if begin > 0 and self._work.more:
                # Where tools are at work, too, it is not waited for requests that other engines may take.
                in_flight = tokens_in_flight + len(self._calling) + sum(len(r[0].token_ids) for r in given.values())
                new = self._work.take(begin, in_flight)
                for place, request in new.items():
                    self._open[place] = _Open(request, next(_numbers))
                    self._order.append(place)
                given |= new
            if given or tokens_in_flight or not self._calling:
                return given
            began = time.perf_counter()
            self._resume(self._answered.get())
            self.waited_s += time.perf_counter() - began

    def _listen(self) -> None:
        while not self._answered.empty():
            self._resume(self._answered.get())

    def _hear(self, place: int, turn: Rollout) -> None:
        """A turn has ended: its calls are made, or the trajectory is over."""
        own = self._open[place]
        own.turns.append(turn)
        own.pieces.append(turn.response_ids)
        calls = self._tools.calls(turn) if turn.stopped else ()
        if not turn.stopped or not calls or len(own.turns) == self._tools.max_turns:
            self._end(place, "cut" if not turn.stopped else "max_turns" if calls else "answered")
        else:
            self._call(place, own, calls)

    def _call(self, place: int, own: _Open, calls: tuple[ToolCall | Malformed, ...]) -> None:
        future = self._tools.runner.submit(own.key, own.request[0].row or {}, calls)
        self._calling[place] = future
        future.add_done_callback(lambda _: self._answered.put(place))

    def _resume(self, place: int) -> None:
        """Its tools have answered: the next turn can begin, or the trajectory is over."""
        own, answers = self._open[place], self._calling.pop(place).result()
        own.num_calls += len(answers)
        own.failures.update(answer.kind for answer in answers if answer.kind)
        if answers[-1].ends:
            self._end(place, "tool")
            return
        own.pieces.append(self._tools.template.between([answer.text for answer in answers]))
        if own.num_tokens < self._room:
            self._ready.append(place)
        else:
            self._end(place, "no_room")

    def _end(self, place: int, end: str) -> None:
        own = self._open.pop(place)
        self._tools.runner.close_trajectory(own.key)
        self._ended[place] = own.rollout(end)

    def _group(self, size: int) -> dict[int, Rollout]:
        places, self._order = self._order[:size], self._order[size:]
        return {place: self._ended.pop(place) for place in places}


def trajectories_of(agents: AgentSpec | None, *, keeps_tools: bool = True) -> Callable[[Work], Work] | None:
    """What makes an engine's work one of trajectories; None: answers are single turns."""
    return None if agents is None else partial(AgentWork, agents=agents, keeps_tools=keeps_tools)
