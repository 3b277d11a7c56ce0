"""How long an engine has nothing to do while tools are at work: next turns as tools answer, and all turns in step.

    python scripts/bench/agents.py

Trajectories, calls and tools' processes are a run's own; only the engine costs a fixed sleep per token in place of a
model, a token of all its turns at once. The tools sleep, too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from bench_setup import print_table
from opsd.agents.runner import ToolRunner
from opsd.agents.tools import ToolCall
from opsd.agents.trajectories import AgentWork
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.engines.work import Work, room_of
from opsd.types import Prompt, Rollout

STOP, CALLS = 0, 1  # a turn's last token, and its first one where it calls a tool
TURN_TOKENS = (10, 90)  # of a turn, at least and at most


class SleepingTools:
    """What `build_sleeping_tools` makes: tools and session in one, as nothing is remembered."""

    schemas = [{"type": "function", "function": {"name": "sleep", "parameters": {"type": "object"}}}]

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def open(self, row: dict[str, Any]) -> SleepingTools:
        return self

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        time.sleep(self.seconds)
        return "slept"

    def close(self) -> None:
        pass


def build_sleeping_tools(seconds: float) -> SleepingTools:
    return SleepingTools(seconds)


class SleepEngine:
    """Decodes a token of all its turns at once, as continuous batching does."""

    def __init__(self, slots: int, step_s: float, num_calls: int) -> None:
        self.max_num_seqs, self.step_s, self.num_calls = slots, step_s, num_calls

    def generate(
        self, work: Work, sampling: Sampling, policy_version: int, group_size: int | None = None
    ) -> Iterator[dict[int, Rollout]]:
        running: dict[int, tuple[Request, int]] = {}  # by place, with the tokens to come
        turns: dict[int, int] = {}
        while running or work.more:
            new = work.take(self.max_num_seqs - len(running), sum(left for _, left in running.values()))
            for place, request in new.items():
                length = int(np.random.default_rng(request[2]).integers(*TURN_TOKENS))
                running[place] = request, min(length, room_of(request, sampling.max_tokens))
            if not running:
                continue
            time.sleep(self.step_s)
            running = {place: (request, left - 1) for place, (request, left) in running.items()}
            for place in [place for place, (_, left) in running.items() if not left]:
                turns[place] = turns.get(place, 0) + 1
                yield {place: self._turn(running.pop(place)[0], calls=turns[place] <= self.num_calls)}

    def _turn(self, request: Request, *, calls: bool) -> Rollout:
        ids = np.array([CALLS if calls else CALLS + 1, STOP], np.int32)
        nothing = np.zeros(2, np.float32)
        return Rollout(
            prompt=request[0],
            sample=request[1],
            response_ids=ids,
            sampled_logprobs=nothing,
            candidate_ids=ids[:, None],
            candidate_logprobs=nothing[:, None],
            stopped=True,
            policy_version=0,
        )


class Overlapped(AgentWork):
    """As in a run, but for the tokenizer and the template."""

    def __init__(self, work: Work, runner: ToolRunner, num_calls: int) -> None:
        super().__init__(work, agents=None)  # type: ignore[arg-type]
        self.tools = SimpleNamespace(
            runner=runner,
            max_turns=num_calls + 1,
            max_open=None,
            template=SimpleNamespace(between=lambda answers: np.full(8, CALLS, np.int32)),
            calls=lambda turn: (ToolCall("sleep", {}),) if turn.response_ids[0] == CALLS else (),
        )

    def toolbox(self) -> Any:
        return self.tools


class InStep(Overlapped):
    """The loop that waits for all tools before it asks for the next turns."""

    def take(self, room: int, tokens_in_flight: int) -> dict[int, Request]:
        if tokens_in_flight:
            return {}
        began = time.perf_counter()
        while self._calling:
            self._resume(self._answered.get())
        self.waited_s += time.perf_counter() - began
        return super().take(room, 0)


def measured(kind: type[Overlapped], args: argparse.Namespace, runner: ToolRunner) -> list[str]:
    prompt = Prompt(index=0, token_ids=np.ones(16, np.int32), text="", answer=None, source="bench", row={})
    requests: dict[int, Request] = {place: (prompt, place, place) for place in range(args.trajectories)}
    work = kind(Work(requests), runner, args.calls)
    engine = SleepEngine(args.trajectories, args.step_ms / 1000, args.calls)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=4096, num_candidates=1)
    began = time.perf_counter()
    made = sum(len(group) for group in work.made_by(engine, sampling, 0, group_size=8))
    wall_s = time.perf_counter() - began
    assert made == args.trajectories
    return [kind.__name__, f"{made}", f"{wall_s:.1f}", f"{wall_s - work.waited_s:.1f}", f"{work.waited_s / wall_s:.0%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=64, help="in flight together")
    parser.add_argument("--calls", type=int, default=4, help="of each trajectory, one per turn")
    parser.add_argument("--tool-s", type=float, default=0.5, help="that a tool sleeps")
    parser.add_argument("--step-ms", type=float, default=2.5, help="of the engine, for a token of all its turns")
    args = parser.parse_args()
    runner = ToolRunner(build="agents:build_sleeping_tools", options={"seconds": args.tool_s}, processes=2)
    try:
        rows = [measured(kind, args, runner) for kind in (InStep, Overlapped)]
    finally:
        runner.close()
    title = (
        f"{args.calls} calls per trajectory, tools sleep {args.tool_s:g} s, a step of the engine {args.step_ms:g} ms"
    )
    print_table(title, ["turns are asked for", "trajectories", "wall s", "engine at work s", "engine idle"], rows)


if __name__ == "__main__":
    main()
