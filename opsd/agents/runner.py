"""Runs the calls of many trajectories in processes of their own: nothing that a tool does can hold up or end a run.

A trajectory's calls go to one process, one after another; those of different trajectories do not wait for each other.
Whatever goes wrong becomes an answer that says so, with a kind that metrics count. No Ray, no torch.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from opsd.agents.calls import Malformed
from opsd.agents.process_handle import ProcessHandle
from opsd.agents.tools import LOST, MALFORMED, TIMED_OUT, Answered, ToolCall
from opsd.errors import ConfigError

TICK_S = 0.05  # between two looks at the clock
STUCK_S = 5.0  # a process that answers nothing for so long after a call was too late is ended
MOST_HUNG = 16  # calls that have not returned when their trajectory was over: their process gets no others


@dataclass
class _Trajectory:
    process: ProcessHandle
    row: dict[str, Any]
    knows_row: bool = False  # the process, from the first call
    hung: int = 0  # the number of a call that was given up and has not returned; 0: none


@dataclass
class _Turn:
    """The calls of one turn; `calls` are those to come."""

    key: Hashable
    trajectory: _Trajectory
    calls: deque[ToolCall | Malformed]
    future: Future[list[Answered]]
    answers: list[Answered] = field(default_factory=list)
    call: ToolCall = ToolCall("", {})  # that is made now
    began: float = 0.0  # when, by time.monotonic()


class ToolRunner:
    """Processes that have built the user's tools, and the calls that they are at."""

    def __init__(
        self,
        *,
        build: str,
        options: dict[str, Any],
        processes: int = 1,
        call_timeout_s: float = 30.0,
        max_answer_chars: int = 4096,
    ) -> None:
        """Waits until the tools are built. Raises ConfigError where they cannot be."""
        self.call_timeout_s = call_timeout_s
        self._setup = (build, options, max_answer_chars)
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._trajectories: dict[Hashable, _Trajectory] = {}
        self._asked: dict[int, _Turn] = {}  # by the number of the call that is made now
        self._closed = False
        self._processes = [self._process() for _ in range(processes)]
        try:
            for process in self._processes:
                process.wait_ready()
        except ConfigError:
            self.close()
            raise
        self.schemas = self._processes[0].schemas
        threading.Thread(target=self._watch, name="tools' clock", daemon=True).start()

    def submit(
        self, key: Hashable, row: dict[str, Any], calls: Sequence[ToolCall | Malformed]
    ) -> Future[list[Answered]]:
        """An answer for each call, in order; none after one that ends the trajectory. The first call opens its session.

        One turn of a trajectory at a time. The future never raises.
        """
        with self._lock:
            if key not in self._trajectories:
                process = min(self._processes, key=lambda each: (each.has_ended, each.num_open))
                process.num_open += 1
                self._trajectories[key] = _Trajectory(process, row)
            turn = _Turn(key, self._trajectories[key], deque(calls), Future())
            self._next(turn)
            return turn.future

    def open(self, row: dict[str, Any]) -> str:
        """Opens a session of this row and closes it. What went wrong; empty: nothing."""
        key = object.__repr__(row)
        [answered] = self.submit(key, row, [ToolCall("", {})]).result()
        self.close_trajectory(key)
        return answered.text

    def close_trajectory(self, key: Hashable) -> None:
        """It is over: its session is closed. One that no call has opened is not known here."""
        with self._lock:
            trajectory = self._trajectories.pop(key, None)
            if trajectory is None:
                return
            process = trajectory.process
            process.num_open -= 1
            process.num_hung += trajectory.hung > 0
            process.send("close", key)
            if process.num_hung >= MOST_HUNG and process in self._processes:
                self._processes[self._processes.index(process)] = self._process()
            if process not in self._processes and not process.num_open:
                process.end()

    def close(self) -> None:
        """Ends the processes, whatever they are at; what is still asked is answered as lost."""
        with self._lock:
            self._closed = True
            known = {id(each.process): each.process for each in self._trajectories.values()}
            for process in [*known.values(), *self._processes]:
                process.end()

    def _process(self) -> ProcessHandle:
        return ProcessHandle(self._setup, answered=self._answered, ended=self._ended)

    def _next(self, turn: _Turn) -> None:
        """Makes the turn's next call, or answers it at once; where none is left the future is done."""
        trajectory = turn.trajectory
        while turn.calls and not (turn.answers and turn.answers[-1].ends):
            call = turn.calls.popleft()
            if isinstance(call, Malformed):
                turn.answers.append(Answered("", f"error: {call.said}", kind=MALFORMED))
            elif trajectory.process.has_ended:
                turn.answers.append(_lost(call.name))
            elif trajectory.hung:
                text = f"error: {call.name} is not called: an earlier call has not returned yet"
                turn.answers.append(Answered(call.name, text, kind=TIMED_OUT))
            else:
                number, turn.call, turn.began = next(self._numbers), call, time.monotonic()
                self._asked[number] = turn
                row = None if trajectory.knows_row else trajectory.row
                trajectory.knows_row = True
                trajectory.process.send("call", turn.key, row, number, call.name, call.arguments)
                return
        turn.future.set_result(turn.answers)

    def _answered(self, process: ProcessHandle, number: int, text: str, ends: bool, kind: str) -> None:
        with self._lock:
            turn = self._asked.pop(number, None)
            if turn is not None:
                self._take(turn, text, ends, kind)
                return
            for trajectory in self._trajectories.values():  # it was given up, and has returned after all
                if trajectory.process is process and trajectory.hung == number:
                    trajectory.hung = 0

    def _take(self, turn: _Turn, text: str, ends: bool, kind: str) -> None:
        turn.answers.append(Answered(turn.call.name, text, ends, kind))
        self._next(turn)

    def _ended(self, process: ProcessHandle) -> None:
        """The process is gone: another one takes its place, and what its trajectories had is lost."""
        with self._lock:
            for number, turn in list(self._asked.items()):
                if turn.trajectory.process is process:
                    del self._asked[number]
                    self._take(turn, _lost(turn.call.name).text, False, LOST)
            if process in self._processes and not self._closed and process.schemas:
                self._processes[self._processes.index(process)] = self._process()

    def _watch(self) -> None:
        """Gives up calls that are too late, and ends processes that answer nothing at all."""
        while not self._closed:
            time.sleep(TICK_S)
            now = time.monotonic()
            with self._lock:
                for number, turn in list(self._asked.items()):
                    process = turn.trajectory.process
                    if now > max(turn.began, process.ready_at) + self.call_timeout_s:
                        self._give_up(number, turn)
                        process.ping(now)
                for process in {id(each.process): each.process for each in self._trajectories.values()}.values():
                    if now > process.silent_since + STUCK_S:
                        process.end()

    def _give_up(self, number: int, turn: _Turn) -> None:
        del self._asked[number]
        turn.trajectory.hung = number
        self._take(turn, f"error: {turn.call.name} did not return within {self.call_timeout_s:g} s", False, TIMED_OUT)


def _lost(name: str) -> Answered:
    text = f"error: {name}: the process of the tools has ended, and with it what this conversation did there"
    return Answered(name, text, kind=LOST)
