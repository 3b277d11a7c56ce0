"""The process in which a user's tools run: a program of its own, started by opsd.agents.runner.

Each trajectory has a thread, so that none waits for another's call; a process may be killed, a thread may not. It loads
nothing of ours but what it needs, and ends when the pipe to who started it closes, whatever its threads are at.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from jsonschema.exceptions import SchemaError, best_match
from jsonschema.validators import Draft202012Validator, validator_for

from opsd.agents.tools import BAD_ARGUMENTS, NOT_TEXT, RAISED, TOO_LONG, UNKNOWN_TOOL, ToolAnswer, Tools
from opsd.config.checks import function_named
from opsd.errors import ConfigError, one_line

LONGEST_REASON = 400  # characters of what a tool raised, or of what is wrong with its arguments
CLOSE: Any = None  # in the place of a call

Schemas = Sequence[dict[str, Any]]
Told = tuple[str, bool, str]  # text, ends, kind: see Answered


class Arguments:
    """Which tools a trajectory has, and what their schemas allow. Raises ConfigError for what is no schema."""

    def __init__(self, schemas: Schemas) -> None:
        self._validators: dict[str, Any] = {}
        for schema in schemas:
            function: Any = schema.get("function") if isinstance(schema, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            if not isinstance(name, str) or not name:
                raise ConfigError(
                    f"expected a tool as {{'type': 'function', 'function': {{'name': ...}}}}, got {schema!r}"
                )
            if name in self._validators:
                raise ConfigError(f"two tools have the name {name!r}")
            parameters = function.get("parameters") or {}
            try:
                kind = validator_for(parameters, default=Draft202012Validator)
                kind.check_schema(parameters)
            except (SchemaError, AttributeError, TypeError) as error:
                raise ConfigError(f"the parameters of the tool {name!r} are no JSON schema: {_said(error)}") from error
            self._validators[name] = kind(parameters)

    def refusal(self, name: str, arguments: Mapping[str, Any]) -> Told | None:
        """None: the call may be made."""
        if name not in self._validators:
            known = ", ".join(self._validators)
            return f"error: there is no tool {name[:LONGEST_REASON]!r}, the tools are: {known}", False, UNKNOWN_TOOL
        wrong = best_match(self._validators[name].iter_errors(arguments))
        if wrong is None:
            return None
        where = "".join(f"[{step!r}]" for step in wrong.absolute_path)
        return f"error: arguments{where} of {name}: {_said(wrong)}", False, BAD_ARGUMENTS


class Trajectory:
    """One trajectory's session and thread."""

    def __init__(self, tools: Tools, row: dict[str, Any], answer: Callable[[int, Told], None], max_chars: int) -> None:
        self.tools, self.row, self.answer, self.max_chars = tools, row, answer, max_chars
        self.asked: queue.SimpleQueue[tuple[int, str, dict[str, Any]]] = queue.SimpleQueue()
        self.session: Any = None
        self.arguments: Arguments | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        loop = asyncio.Runner()  # one for all calls, as a session's client may belong to it; made at its first use
        while (asked := self.asked.get()) is not CLOSE:
            number, name, arguments = asked
            self.answer(number, self._told(loop, name, arguments))
        with suppress(Exception):  # nobody is left to tell
            if self.session is not None:
                self._run(loop, self.session.close())
            loop.close()

    def _told(self, loop: asyncio.Runner, name: str, arguments: dict[str, Any]) -> Told:
        try:
            if self.session is None:
                self.arguments = Arguments(self.row.get("tools") or self.tools.schemas)
                self.session = self.tools.open(self.row)
            assert self.arguments is not None, "made with the session"
            refused = self.arguments.refusal(name, arguments) if name else ("", False, "")  # no name: open it
            if refused is not None:
                return refused
            return as_text(name, self._run(loop, self.session.call(name, arguments)), self.max_chars)
        except BaseException as error:  # a user's code, which may do anything
            return f"error: {name or 'open'} raised {type(error).__name__}: {_said(error)}", False, RAISED

    def _run(self, loop: asyncio.Runner, value: Any) -> Any:
        """The value, awaited where a call is async."""

        async def awaited() -> Any:
            return await value

        return loop.run(awaited()) if inspect.isawaitable(value) else value


def as_text(name: str, answer: Any, max_chars: int) -> Told:
    """What is told of what a call returned: text that UTF-8 can write, of at most so many characters and a note."""
    ends = isinstance(answer, ToolAnswer) and answer.ends is True
    text: Any = answer.text if isinstance(answer, ToolAnswer) else answer
    kind = ""
    if not isinstance(text, str):
        return f"error: {name} returned {type(text).__name__}, expected a str or a ToolAnswer", ends, NOT_TEXT
    if len(text) > max_chars:
        note = f"\n[the first {max_chars} of {len(text)} characters; the rest is left out]"
        text, kind = text[:max_chars] + note, TOO_LONG
    valid = text.encode("utf-8", "replace").decode()
    return (valid, ends, kind) if valid == text else (f"{valid}\n[what is not valid Unicode is a ?]", ends, NOT_TEXT)


def _said(error: BaseException) -> str:
    """What it says, in a line that is not long and can be written."""
    message = getattr(error, "message", None)
    try:
        said = one_line(message if isinstance(message, str) else str(error))
    except Exception:  # its __str__ is a user's, too
        said = "(it cannot be shown)"
    return said if len(said) <= LONGEST_REASON else said[:LONGEST_REASON] + " ..."


def serve(pipe: Connection, tools: Tools, max_chars: int) -> None:
    """Answers ("call", key, row, number, name, arguments), ("close", key) and ("ping",) until the pipe closes."""
    writing = threading.Lock()
    trajectories: dict[Hashable, Trajectory] = {}

    def answer(number: int, told: Told) -> None:
        with writing:
            pipe.send(("answer", number, told))

    while True:
        what, *rest = pipe.recv()
        if what == "ping":
            with writing:
                pipe.send(("pong",))
        elif what == "close":
            trajectory = trajectories.pop(rest[0], None)
            if trajectory is not None:
                trajectory.asked.put(CLOSE)
        else:
            key, row, *call = rest
            if key not in trajectories:
                trajectories[key] = Trajectory(tools, row, answer, max_chars)
            trajectories[key].asked.put((call[0], call[1], call[2]))


def as_json(schemas: Schemas) -> list[dict[str, Any]]:
    """Plain values, as a chat template and another process take them."""
    return json.loads(json.dumps(list(schemas)))


def built(build: str, options: dict[str, Any]) -> Tools:
    """What `build` returns. Raises ConfigError, whatever goes wrong in it."""
    function = function_named("tools.build", build, takes="", by_name=options)
    try:
        tools = function(**options)
        schemas = as_json(tools.schemas)
    except BaseException as error:
        raise ConfigError(f"tools.build={build} raised {type(error).__name__}: {_said(error)}") from error
    if not schemas or not callable(getattr(tools, "open", None)):
        raise ConfigError(f"tools.build={build} must return an object with schemas, at least one, and open(row)")
    try:
        Arguments(schemas)
    except ConfigError as error:
        raise ConfigError(f"tools.build={build}: {error}") from error
    return tools


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us, whose end is ours
    os.dup2(2, 1)  # what a tool prints is no result of the run's
    with Connection(int(sys.argv[1])) as pipe, suppress(EOFError, OSError):
        build, options, max_chars = pipe.recv()
        try:
            tools = built(build, options)
            pipe.send(("ready", as_json(tools.schemas)))
        except Exception as error:
            pipe.send(("failed", _said(error)))
            os._exit(1)
        serve(pipe, tools, max_chars)
    os._exit(0)


if __name__ == "__main__":
    main()
