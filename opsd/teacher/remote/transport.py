"""Requests to several servers of the same teacher: spread over them, repeated, and taken away from a dead one.

A server that answers 500, or nonsense, may be ill, or well and unable to answer this one request (a NaN, say). What it
has answered before tells the two apart: asked that once more, an ill server fails again. A request that two well
servers fail on, or one twice, is given up by itself; the servers stay in use.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from opsd.config.http import HttpConfig
from opsd.errors import StageError
from opsd.teacher.remote.client import BUSY, UNREADABLE, client_settings, describe, is_repeated, sentence, unread
from opsd.types import NoScores

# What the request itself is refused for: too long, malformed. Other codes are about the address or the token.
REFUSED = (400, 413, 422)
MOST_ATTEMPTS = 2  # at a request on which servers that are well fail

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass
class Server:
    """An address and how it fares."""

    url: str
    in_flight: int = 0  # requests
    failures: int = 0  # in a row
    paused_until: float = 0.0  # time.monotonic() before which it is not asked
    reason: str = ""  # of the last failure

    def failed(self, reason: str, cfg: HttpConfig) -> None:
        """A longer pause with every failure; requests that were under way together count as one."""
        self.reason = reason
        now = time.monotonic()
        if now < self.paused_until:
            return
        pause_s = min(cfg.max_backoff_s, cfg.backoff_s * 2**self.failures)
        self.paused_until = now + pause_s * random.SystemRandom().uniform(0.5, 1.0)  # clients do not come back in step
        self.failures += 1
        if self.failures == 1:
            logger.warning("teacher server %s: %s; its requests go elsewhere or wait", self.url, reason)

    def answered(self) -> None:
        if self.failures:
            logger.warning("teacher server %s answers again", self.url)
        self.failures, self.paused_until = 0, 0.0


class RequestFailed(StageError):
    """The servers are well, and this one request has no answer."""

    def __init__(self, reason: str, said: str) -> None:
        """`reason`: as in NoScores."""
        super().__init__(reason, said)
        self.reason, self.said = reason, said

    def __str__(self) -> str:
        return f"score: {self.said}"


class Transport:
    """Sends from a thread of its own, which ends with the process: nothing waits for a server that hangs."""

    def __init__(self, urls: list[str], cfg: HttpConfig, token: str = "") -> None:
        self.cfg = cfg
        self.servers = [Server(url=url.rstrip("/")) for url in urls]
        self._client = httpx.AsyncClient(**client_settings(cfg, token))
        self._answerable: tuple[str, Callable, dict] | None = None  # as `post` takes them
        self._slots = asyncio.Semaphore(cfg.max_in_flight * len(urls))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="teacher-http", daemon=True).start()

    def post(self, path: str, read: Callable[[httpx.Response], Answer], **body: Any) -> Future[Answer]:
        """What `read` makes of the answer (200) of one of the servers. `body`: httpx's `content` or `json`.

        The future raises RequestFailed where this request alone has no answer, StageError where no request has one: a
        server refuses us, or for `give_up_after_s` since the first failure no server has answered.
        """
        return asyncio.run_coroutine_threadsafe(self._post(path, read, body), self._loop)

    def expect_answer(self, path: str, **body: Any) -> None:
        """A request that a server which is well has an answer to: what to ask one with until another is known."""
        self._answerable = (path, lambda response: response, body)

    async def _post(self, path: str, read: Callable, body: dict) -> Any:
        give_up_at: float | None = None
        failed_on: list[Server] = []  # the servers that are well and failed
        async with self._slots:
            while True:
                server = await self._next_server(give_up_at, failed_on)
                answer, reason, is_broken = await self._try(server, path, read, body)
                if not reason:
                    self._answerable = (path, read, body)
                    return answer
                if is_broken and await self._is_well(server):
                    failed_on.append(server)
                    if len(failed_on) < MOST_ATTEMPTS:
                        continue
                    raise RequestFailed("teacher_error", f"{server.url}{path} fails on this request alone: {reason}")
                server.failed(reason, self.cfg)
                give_up_at = give_up_at or time.monotonic() + self.cfg.give_up_after_s
                if time.monotonic() >= give_up_at:
                    tried = "; ".join(f"{each.url}: {each.reason}" for each in self.servers if each.reason)
                    raise StageError(
                        f"score: no teacher server has answered for {self.cfg.give_up_after_s:g} s ({tried})"
                    )

    async def _is_well(self, server: Server) -> bool:
        """Whether it answers what any server that is well can answer; False where no such request is known."""
        if self._answerable is None:
            return False
        path, read, body = self._answerable
        try:
            _, reason, _ = await self._try(server, path, read, body)
        except RequestFailed:
            return False
        return not reason

    async def _next_server(self, give_up_at: float | None, failed_on: list[Server]) -> Server:
        """The least busy server that is not paused; where all are, the first to come back, or the one due at the end.

        One of `failed_on` only where all others are paused.
        """
        due_at = min(server.paused_until for server in self.servers)
        await asyncio.sleep(max(0.0, min(due_at, give_up_at or due_at) - time.monotonic()))
        ready = [server for server in self.servers if server.paused_until <= time.monotonic()]
        return min(ready or self.servers, key=lambda server: (server in failed_on, server.in_flight, server.failures))

    async def _try(self, server: Server, path: str, read: Callable, body: dict) -> tuple[Any, str, bool]:
        """(answer, "", False), or (None, why there is none, whether the request may be the cause).

        Raises RequestFailed or StageError for what no server would answer.
        """
        server.in_flight += 1
        try:
            async with asyncio.timeout(self.cfg.timeout_s):  # httpx's own is for each part that comes
                response = await self._client.post(server.url + path, **body)
        except TimeoutError:
            return None, f"no whole answer within {self.cfg.timeout_s:g} s", False
        except httpx.RequestError as error:
            return None, describe(error), isinstance(error, httpx.DecodingError)
        finally:
            server.in_flight -= 1
        status, said = response.status_code, f"{response.status_code} {sentence(response)}"
        if is_repeated(status):
            return None, said, status not in BUSY
        if status in REFUSED:
            raise RequestFailed("teacher_refused", f"{server.url}{path} refuses: {said}")
        if status != 200:
            raise StageError(f"score: {server.url}{path} refuses: {said}")
        try:
            answer = read(response)
        except UNREADABLE as error:
            return None, f"its answer cannot be read: {unread(error, response)}", True
        server.answered()
        return answer, "", False


def no_scores(failed: RequestFailed) -> NoScores:
    """What stands in place of the scores of the one rollout that was asked about."""
    logger.warning("an answer without scores, which is dropped: %s", failed.said)
    return NoScores(reason=failed.reason, said=failed.said)
