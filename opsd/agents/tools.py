"""What a user's tools are: `build_tools(**options)` returns Tools, which open a Session for every trajectory."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


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
