"""Bodies of requests as they arrive, with a bound on what they hold of the memory: each, and all together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from opsd.teacher.server.limits import Limits, Refusal


class Intake:
    def __init__(self, limits: Limits, max_held_bytes: int) -> None:
        self.limits = limits
        self.max_held_bytes = max_held_bytes
        self.held_bytes = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, which counts until the block is left.

        Raises Refusal: 413 for a body that is too large, 503 where the others leave no room for it.
        """
        self.limits.check_body(int(request.headers.get("content-length", 0)))
        parts: list[bytes] = []
        num_bytes = 0
        try:
            async for part in request.stream():
                num_bytes += len(part)
                self.held_bytes += len(part)
                self.limits.check_body(num_bytes)
                if self.held_bytes > self.max_held_bytes:
                    raise Refusal(503, "the requests under way leave no room for this one: come back later")
                parts.append(part)
            yield b"".join(parts)
        except ClientDisconnect as error:
            raise Refusal(400, "the client left before its request was whole") from error
        finally:
            self.held_bytes -= num_bytes
