"""A teacher server's connections: how many there may be, and how long one may take over a request or its answer.

uvicorn bounds neither. A client that connects and says nothing, that sends a byte a minute or that does not take its
answer would keep its connection, and what it holds of the memory, for ever; and nobody needs a token to connect.
"""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from opsd.errors import ConfigError

GRACE_S = 20  # for requests under way when the server is told to end
BACKLOG = 256  # connections that the system keeps until they are accepted, all of them in one go
OTHER_FILES = 128  # that the process has open beside its connections


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    connections: int
    transfer_s: float  # for a whole request to arrive, and for its answer to be taken
    on_drop: Callable[[str], None]  # is told why a connection is ended: evicted | full | slow


def http_server(app: FastAPI, limits: ConnectionLimits) -> uvicorn.Server:
    """Logs errors of ours alone: what clients do is counted."""
    config = uvicorn.Config(
        app,
        http=connection_class(limits),
        ws="none",  # a web socket would leave the limits
        lifespan="off",
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=GRACE_S,
    )
    return uvicorn.Server(config)


def allow_files(max_connections: int) -> None:
    """Each connection is an open file of this process. Raises ConfigError where the system allows fewer."""
    needed = max_connections + BACKLOG + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"max_connections={max_connections} needs {needed} open files, and this process may have {hard} (ulimit -n)"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def connection_class(given: ConnectionLimits) -> type[Connection]:
    """The protocol of one server: uvicorn makes an object of it for every connection."""

    class LimitedConnection(Connection):
        limits = given
        waiting = {}

    return LimitedConnection


class Connection(H11Protocol):
    """h11's, which bounds the headers too; the parser that is written in C takes them at any length."""

    limits: ClassVar[ConnectionLimits]
    waiting: ClassVar[dict[Connection, None]]  # for a request or for its answer to be taken; the longest first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.deadline: asyncio.TimerHandle | None = None
        self._watch()
        if len(self.connections) > self.limits.connections:
            longest = next(each for each in self.waiting if not each.transport.get_write_buffer_size())
            if longest is self:
                self._end("full", 503, "every connection has a request under way: come back later")
            else:
                longest._end("evicted")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.waiting.pop(self, None)
        self._stop_clock()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, which fails where an answer has begun."""
        self._say(400, msg)
        self.transport.close()

    def _watch(self) -> None:
        """The clock runs while the client has something to do: to send a request, or to take its answer."""
        is_asked = self.cycle is not None and not self.cycle.response_complete
        if is_asked:
            self.waiting.pop(self, None)
        else:
            self.waiting.setdefault(self)
        if is_asked and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_clock()
        elif self.deadline is None and not self.transport.is_closing():
            self.deadline = self.loop.call_later(self.limits.transfer_s, self._late)

    def _late(self) -> None:
        self._end("slow", 408, f"no whole request within {self.limits.transfer_s:g} s")

    def _end(self, reason: str, status: int = 0, said: str = "") -> None:
        """At once, where nothing is to be said or an answer is still not taken."""
        self.limits.on_drop(reason)
        self.waiting.pop(self, None)  # it is lost only later, and is not to be chosen twice
        if not status or self.transport.get_write_buffer_size() > 0:
            self.transport.abort()
            return
        self._say(status, said)
        self.transport.close()

    def _say(self, status: int, said: str) -> None:
        """A last answer, where none has begun."""
        body = json.dumps({"error": said}).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            with suppress(h11.LocalProtocolError):  # to a HEAD, which takes no body
                for event in (h11.Response(status_code=status, headers=[*headers.items()]), h11.Data(data=body)):
                    self.transport.write(self.conn.send(event))
                self.transport.write(self.conn.send(h11.EndOfMessage()))

    def _stop_clock(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None
