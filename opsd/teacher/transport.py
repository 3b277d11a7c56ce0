"""Requests to several servers of the same teacher: spread over them, repeated, and taken away from a dead one."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass

import httpx

from opsd.errors import ConfigError, StageError
from opsd.remote_config import HttpConfig, read_token

# The server is busy, not there any more, or broken; another one, or the same one later, may answer.
REPEATED = (408, 429, 500, 502, 503, 504)

logger = logging.getLogger(__name__)


@dataclass
class Server:
    """An address and how it fares."""

    url: str
    in_flight: int = 0  # requests
    failures: int = 0  # in a row
    rests_until: float = 0.0  # time.monotonic() before which it is not asked
    reason: str = ""  # of the last failure

    def failed(self, reason: str, cfg: HttpConfig) -> None:
        """Longer rests with every failure; requests that were under way together count as one."""
        self.reason = reason
        now = time.monotonic()
        if now < self.rests_until:
            return
        rest_s = min(cfg.max_backoff_s, cfg.backoff_s * 2**self.failures)
        self.rests_until = now + rest_s * random.SystemRandom().uniform(0.5, 1.0)  # clients do not come back in step
        self.failures += 1
        if self.failures == 1:
            logger.warning("teacher server %s: %s; its requests go elsewhere or wait", self.url, reason)

    def answered(self) -> None:
        if self.failures:
            logger.warning("teacher server %s answers again", self.url)
        self.failures, self.rests_until = 0, 0.0


class Transport:
    """Sends from a thread of its own, which ends with the process: nothing waits for a server that hangs."""

    def __init__(self, urls: list[str], cfg: HttpConfig) -> None:
        self.cfg = cfg
        self.servers = [Server(url=url.rstrip("/")) for url in urls]
        self._client = httpx.AsyncClient(**client_settings(cfg))
        self._slots = asyncio.Semaphore(cfg.max_in_flight * len(urls))
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="teacher-http", daemon=True).start()

    def post(self, path: str, **body) -> Future[httpx.Response]:
        """The answer (200) of one of the servers. `body`: httpx's `content` or `json`.

        The future raises StageError where a server refuses the request, and where for `give_up_after_s` since its
        first failure no server has answered.
        """
        return asyncio.run_coroutine_threadsafe(self._post(path, body), self._loop)

    async def _post(self, path: str, body: dict) -> httpx.Response:
        give_up_at = None
        async with self._slots:
            while True:
                server = await self._next_server(give_up_at)
                response, reason = await self._try(server, path, body)
                if response is not None:
                    return response
                server.failed(reason, self.cfg)
                give_up_at = give_up_at or time.monotonic() + self.cfg.give_up_after_s
                if time.monotonic() >= give_up_at:
                    tried = "; ".join(f"{each.url}: {each.reason}" for each in self.servers if each.reason)
                    raise StageError(
                        f"score: no teacher server has answered for {self.cfg.give_up_after_s:g} s ({tried})"
                    )

    async def _next_server(self, give_up_at: float | None) -> Server:
        """The least busy of those that do not rest; where all rest, the first to wake, or the one due at the end."""
        wakes_at = min(server.rests_until for server in self.servers)
        await asyncio.sleep(max(0.0, min(wakes_at, give_up_at or wakes_at) - time.monotonic()))
        awake = [server for server in self.servers if server.rests_until <= time.monotonic()]
        return min(awake or self.servers, key=lambda server: (server.in_flight, server.failures))

    async def _try(self, server: Server, path: str, body: dict) -> tuple[httpx.Response | None, str]:
        """(answer, "") or (None, why there is none). Raises StageError for what no server would answer."""
        server.in_flight += 1
        try:
            response = await self._client.post(server.url + path, **body)
        except httpx.TransportError as error:
            return None, describe(error)
        finally:
            server.in_flight -= 1
        if response.status_code in REPEATED:
            return None, f"{response.status_code} {sentence(response)}"
        if response.status_code != 200:
            raise StageError(f"score: {server.url}{path} refuses: {response.status_code} {sentence(response)}")
        server.answered()
        return response, ""


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
            if response is not None and response.status_code not in REPEATED:
                raise ConfigError(f"teacher.urls: {url}{path} refuses: {reason}")
            if time.monotonic() >= give_up_at:
                raise ConfigError(f"teacher.urls: {url} is not ready after {cfg.start_timeout_s:g} s: {reason}")
            if not waited:
                logger.warning("waiting for the teacher server %s: %s", url, reason)
            waited = True
            time.sleep(cfg.backoff_s)


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
