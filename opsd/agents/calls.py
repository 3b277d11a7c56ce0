"""From the text of a turn to the calls that the student wrote in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from opsd.agents.tools import ToolCall
from opsd.data.thoughts import after_thought
from opsd.strict_json import JsonError, read_json

OPENS, CLOSES = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Malformed:
    """Something that was meant as a call, and what is wrong with it, in words for the student."""

    said: str


Parsed = tuple[ToolCall | Malformed, ...]  # in the order of the text; empty: the turn calls nothing


def hermes(text: str) -> Parsed:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes and Qwen write them; any number.

    `text`: of one turn, without the token that ends it. A thought calls nothing, nor what stands in an unfinished one.
    """
    said = after_thought(text)
    if said is None:
        return ()
    _, *blocks = said.split(OPENS)
    return tuple(_call(block) for block in blocks)


def _call(block: str) -> ToolCall | Malformed:
    """`block`: from behind one OPENS to the next, or to the end of the turn."""
    inside, closes, _ = block.partition(CLOSES)
    if not closes:
        return Malformed(f"the call is not closed by {CLOSES}")
    try:
        value: Any = read_json(inside)
    except JsonError as error:
        return Malformed(f"the call is not valid JSON: {error}")
    if not isinstance(value, dict):
        return Malformed(f"the call must be a JSON object with name and arguments, got {type(value).__name__}")
    name, arguments = value.get("name"), value.get("arguments", {})
    if not isinstance(name, str) or not name:
        return Malformed("the call has no name of a tool: it must be a string in the field 'name'")
    if not isinstance(arguments, dict):
        return Malformed(f"the arguments of {name} must be a JSON object, got {type(arguments).__name__}")
    return ToolCall(name, arguments)


PARSERS: dict[str, Callable[[str], Parsed]] = {"hermes": hermes}
