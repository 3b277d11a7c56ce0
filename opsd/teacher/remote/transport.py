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

from opsd.config.http import HttpConfig, read_token
from opsd.errors import ConfigError, StageError
from opsd.types import NoScores, TeacherScores

# The server is busy, or not there any more; another one, or the same one later, may answer. So it may after any other
# 5xx, which a server that is well also says of a request that it breaks on.
BUSY = (408, 429, 502, 503, 504)
# What the request itself is refused for: too long, malformed. Other codes are about the address or the token.
REFUSED = (400, 413, 422)
MOST_ATTEMPTS = 2  # at a request on which servers that are well fail
UNREADABLE = (ValueError, KeyError, TypeError, IndexError)  # what reading a malformed answer raises

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
        super().__init__(f"score: {said}")
        self.reason, self.said = reason, said


class Transport:
    """Sends from a thread of its own, which ends with the process: nothing waits for a server that hangs."""

    def __init__(self, urls: list[str], cfg: HttpConfig) -> None:
        self.cfg = cfg
        self.servers = [Server(url=url.rstrip("/")) for url in urls]
        self._client = httpx.AsyncClient(**client_settings(cfg))
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
            response = await self._client.post(server.url + path, **body)
        except httpx.TransportError as error:
            return None, describe(error), False
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
            return None, f"its answer cannot be read: {type(error).__name__}: {error}", True
        server.answered()
        return answer, "", False


def result_of(answer: Future[TeacherScores]) -> TeacherScores | NoScores:
    """What came of a request for the scores of one rollout. Raises StageError where the servers are lost."""
    try:
        return answer.result()
    except RequestFailed as failed:
        return no_scores(failed)


def no_scores(failed: RequestFailed) -> NoScores:
    """What stands in place of the scores of the one rollout that was asked about."""
    logger.warning("an answer without scores, which is dropped: %s", failed.said)
    return NoScores(reason=failed.reason, said=failed.said)


def get_when_ready(url: str, path: str, cfg: HttpConfig) -> httpx.Response:
    """A server's answer to GET, once it has one. Raises ConfigError after start_timeout_s, or where it refuses."""
    give_up_at, waited = time.monotonic() + cfg.start_timeout_s, False
    with httpx.Client(**client_settings(cfg)) as client:
        while True:
            try:
                response = client.get(url.rstrip("/") + path)
                reason = f"{response.status_code} {sentence(response)}"
            except httpx.TransportError as error:
                response, reason = None, describe(error)
            if response is not None and response.status_code == 200:
                return response
            if response is not None and not is_repeated(response.status_code):
                raise ConfigError(f"teacher.urls: {url}{path} refuses: {reason}")
            if time.monotonic() >= give_up_at:
                raise ConfigError(f"teacher.urls: {url} is not ready after {cfg.start_timeout_s:g} s: {reason}")
            if not waited:
                logger.warning("waiting for the teacher server %s: %s", url, reason)
            waited = True
            time.sleep(cfg.backoff_s)


def is_repeated(status: int) -> bool:
    return status in BUSY or status >= 500


def client_settings(cfg: HttpConfig) -> dict:
    token = read_token("teacher.http.", cfg.token_file, cfg.token_env)
    return {
        "headers": {"Authorization": f"Bearer {token}"} if token else {},
        "timeout": httpx.Timeout(cfg.timeout_s, connect=cfg.connect_timeout_s, pool=None),
        # Servers close a connection that idles for 5 s: a request must not meet that.
        "limits": httpx.Limits(max_connections=None, keepalive_expiry=2.0),
        "trust_env": False,  # a cluster's proxy is for the internet, not for the next node
    }


def describe(error: httpx.TransportError) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def sentence(response: httpx.Response) -> str:
    """What the server says of an error, cut to a line."""
    return " ".join(response.text.split())[:500]
