"""Tools that the student may call while it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opsd.config.checks import at_least, one_of, seconds

TOOL_PARSERS = ("hermes",)


@dataclass
class ToolsConfig:
    """A rollout is then a trajectory: turns of the student's, with tools' answers between them."""

    build: str = ""  # package.module:function, returns the tools, see docs/agents.md; empty: none, one turn
    options: dict[str, Any] = field(default_factory=dict)  # for that function, by name
    parser: str = "hermes"  # how calls are written: hermes, <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    # Turns of the student's at most. All tokens of a trajectory, tools' too, share rollout.max_response_tokens.
    max_turns: int = 8
    # Trajectories that an engine has begun and not ended, each with a session of its own: while tools are at work it
    # begins others, so that it is not idle. None: twice its max_num_seqs; less than max_num_seqs leaves it idle.
    max_open: int | None = None
    call_timeout_s: float = 30.0  # for one call; the first one opens the trajectory's session, too
    max_answer_chars: int = 4096  # of one answer of a tool; what is longer is cut
    processes: int = 1  # of each engine that answers, in which tools run

    def __post_init__(self) -> None:
        one_of("tools.parser", self.parser, TOOL_PARSERS)
        seconds("tools.call_timeout_s", self.call_timeout_s)
        for name in ("max_turns", "max_open", "max_answer_chars", "processes"):
            if (value := getattr(self, name)) is not None:
                at_least(f"tools.{name}", value, 1)
