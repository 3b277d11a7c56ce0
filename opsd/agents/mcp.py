"""Tools of an MCP server (Model Context Protocol): a program that is asked over its stdin and stdout.

    tools.build=opsd.agents.mcp:build_tools "+tools.options={command: [python, /path/of/server.py]}"

Needs the package `mcp`, its official client: pip install '.[mcp]'. The client is asynchronous; here it runs in a thread
of its own, and who calls waits.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from opsd.errors import ConfigError

if TYPE_CHECKING:  # an extra of this package's
    from mcp import Client, StdioServerParameters
    from mcp.types import CallToolResult, Tool


START_S = 60.0  # that a server may take to tell its tools


class ServerError(RuntimeError):
    """What a server says went wrong with a call."""


class Server:
    """A server that was started, and its client. Calls may come from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, parameters: StdioServerParameters, timeout_s: float) -> None:
        """Waits until it has told its tools. Raises what the client does where it does not."""
        self._loop, self._timeout_s = loop, timeout_s
        self._over = asyncio.Event()
        self._told: Future[list[Tool]] = Future()
        self.has_ended = False
        asyncio.run_coroutine_threadsafe(self._live(parameters), loop)
        self.tools = self._told.result()

    async def _live(self, parameters: StdioServerParameters) -> None:
        """From start to end in one task, as the client asks for."""
        from mcp import Client

        try:
            async with Client(parameters, read_timeout_seconds=START_S) as self._client:
                self._told.set_result(await all_tools(self._client))
                await self._over.wait()
        except Exception as error:  # for who waits; later nobody does, and calls have failed by themselves
            if not self._told.done():
                self._told.set_exception(innermost(error))

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Raises ServerError, or MCPError where there is no answer."""
        from mcp import MCPError
        from mcp.types import CONNECTION_CLOSED

        try:
            asked = self._client.call_tool(name, arguments, read_timeout_seconds=self._timeout_s)
            return text_of(asyncio.run_coroutine_threadsafe(asked, self._loop).result())
        except MCPError as error:
            self.has_ended = self.has_ended or error.code == CONNECTION_CLOSED
            raise

    def close(self) -> None:
        """Does not wait: its stdin is closed, and where it does not end in some seconds it is killed."""
        self._loop.call_soon_threadsafe(self._over.set)


class OwnServer:
    """A session with a server of its own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.call = server.call

    def close(self) -> None:
        self._server.close()


class SharedServer:
    """A session with a server that others use, too."""

    def __init__(self, server: Server) -> None:
        self.call = server.call

    def close(self) -> None:
        pass


class McpTools:
    """See `build_tools`."""

    def __init__(self, parameters: StdioServerParameters, *, shared: bool, timeout_s: float) -> None:
        self._parameters, self._timeout_s = parameters, timeout_s
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="MCP client", daemon=True).start()
        self._starting = threading.Lock()
        server = self._start()
        self.schemas = [schema_of(tool) for tool in server.tools]
        self._shared = server if shared else None
        if not shared:
            server.close()

    def open(self, row: dict[str, Any]) -> OwnServer | SharedServer:
        if self._shared is None:
            return OwnServer(self._start())
        with self._starting:  # those of other trajectories wait for it, too
            if self._shared.has_ended:
                self._shared = self._start()
            return SharedServer(self._shared)

    def _start(self) -> Server:
        return Server(self._loop, self._parameters, self._timeout_s)


def build_tools(
    command: Sequence[str], env: Sequence[str] = (), shared: bool = False, timeout_s: float = 60.0
) -> McpTools:
    """`command`: starts the server, with whole paths. `env`: names of variables that it gets of the run's environment,
    beside PATH, HOME and the like; their values are no settings, which are written down. `timeout_s`: a call that it
    has not answered until then has failed, and its thread is free again; the student waits tools.call_timeout_s.

    Each trajectory that calls has a server of its own, as what a server remembers belongs to one conversation, and one
    that ends or hangs takes no other trajectory with it. `shared`: one for all trajectories of a process of the tools,
    where the server remembers nothing and takes long to start or much memory; started again where it has ended.

    Raises ConfigError without the package, for a command that is none, or a variable that is not set.
    """
    try:
        from mcp import StdioServerParameters
    except ImportError as error:
        raise ConfigError(f"opsd.agents.mcp needs the package mcp: pip install '.[mcp]' ({error})") from error
    if isinstance(command, str) or not command or not all(isinstance(part, str) for part in command):
        raise ConfigError(f"tools.options.command must be a list of a program and its arguments, got {command!r}")
    unset = [name for name in env if name not in os.environ]
    if unset:
        raise ConfigError(f"tools.options.env: {', '.join(unset)} is not set in the environment of the tools' process")
    program, *arguments = command
    given = {name: os.environ[name] for name in env}
    parameters = StdioServerParameters(command=program, args=arguments, env=given)
    return McpTools(parameters, shared=shared, timeout_s=timeout_s)


async def all_tools(client: Client) -> list[Tool]:
    """Of all pages."""
    page = await client.list_tools()
    tools = list(page.tools)
    while page.next_cursor:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tools


def schema_of(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def text_of(result: CallToolResult) -> str:
    """What the student reads. Raises ServerError where the call went wrong.

    Of pictures, sounds and links a word says that they were there.
    """
    parts = [_text(block) for block in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    text = "\n".join(parts)
    if result.is_error:
        raise ServerError(text)
    return text


def _text(block: Any) -> str:
    """Of one block of content, which may be a text, a file that is one, or something else."""
    text = getattr(getattr(block, "resource", block), "text", None)
    return text if isinstance(text, str) else f"[{block.type.replace('_', ' ')}: not text, left out]"


def innermost(error: BaseException) -> BaseException:
    """Of a group of one error that error."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        [error] = error.exceptions
    return error
