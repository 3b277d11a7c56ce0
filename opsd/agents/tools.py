"""What a user's tools are: `build_tools(**options)` returns Tools, which open a Session for every trajectory."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# What may go wrong with a call; metrics count each.
MALFORMED = "malformed"  # the student wrote no call that the parser takes
UNKNOWN_TOOL = "unknown_tool"
BAD_ARGUMENTS = "bad_arguments"  # not what the tool's schema allows
RAISED = "raised"
TIMED_OUT = "timed_out"
TOO_LONG = "too_long"  # it was cut
NOT_TEXT = "not_text"  # no string, or one that is not valid Unicode
LOST = "lost"  # the process of the trajectory's tools has ended
FAILURES = (MALFORMED, UNKNOWN_TOOL, BAD_ARGUMENTS, RAISED, TIMED_OUT, TOO_LONG, NOT_TEXT, LOST)


@dataclass(frozen=True)
class ToolCall:
    """A call that the student wrote, as its parser understood it; nothing about it is checked yet."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class ToolAnswer:
    """What a tool says to the student."""

    text: str
    ends: bool = False  # the trajectory is over: the student is not asked again, and does not read this


@dataclass(frozen=True)
class Answered:
    """What came of one call."""

    name: str  # of the tool; empty where the call was malformed
    text: str  # what the student reads
    ends: bool = False
    kind: str = ""  # one of FAILURES; empty: it went well


class Session(Protocol):
    """The state of one trajectory. All of its calls are made in one process, one after another."""

    def call(self, name: str, arguments: dict[str, Any]) -> str | ToolAnswer | Awaitable[str | ToolAnswer]:
        """Answers one call of a tool that is among the schemas, with arguments that its schema allows.

        May be `async`. What it raises is told to the student in a line, and counted.
        """
        ...

    def close(self) -> None:
        """The trajectory is over, whatever ended it. Called once, unless its process was lost."""
        ...


class Tools(Protocol):
    """What `tools.build` makes, once in each of the tools' processes."""

    # {"type": "function", "function": {"name", "description", "parameters": a JSON schema}} each
    @property
    def schemas(self) -> Sequence[dict[str, Any]]: ...

    def open(self, row: dict[str, Any]) -> Session:
        """A trajectory begins. `row`: that of the prompt file, all of its fields."""
        ...
