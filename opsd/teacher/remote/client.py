"""What all requests to a teacher's servers have in common: how they are sent, and what is said of those that fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from opsd.config.engine import EngineSpec, TeacherConfig
from opsd.config.http import HttpConfig
from opsd.config.secrets import read_token
from opsd.errors import ConfigError

# The server is busy, or not there any more; another one, or the same one later, may answer. So it may after any other
# 5xx, which a server that is well also says of a request that it breaks on.
BUSY = (408, 429, 502, 503, 504)
# What reading a malformed answer raises.
UNREADABLE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServedSpec(EngineSpec[TeacherConfig]):
    """What the client of a teacher's servers is made of, once they have been waited for."""

    served: dict[str, Any]  # what all of the servers say of themselves
    token: str = field(repr=False)  # that they ask for: the client may run where neither file nor variable has it


def get_when_ready(url: str, path: str, cfg: HttpConfig, read: Callable[[httpx.Response], Answer]) -> Answer:
    """What `read` makes of a server's answer to GET, once it has one.

    Raises ConfigError after start_timeout_s, or where it refuses or answers something else (`read` raises one of
    UNREADABLE).
    """
    give_up_at, waited = time.monotonic() + cfg.start_timeout_s, False
    address = url.rstrip("/") + path
    with httpx.Client(**client_settings(cfg, token_of(cfg))) as client:
        while True:
            try:
                response = client.get(address)
                reason = f"{response.status_code} {sentence(response)}"
            except httpx.RequestError as error:
                response, reason = None, describe(error)
            if response is not None and response.status_code == 200:
                try:
                    return read(response)
                except UNREADABLE as error:
                    raise ConfigError(
                        f"teacher.urls: {address} is not what this run expects there: {unread(error, response)}"
                    ) from error
            if response is not None and not is_repeated(response.status_code):
                raise ConfigError(f"teacher.urls: {address} refuses: {reason}")
            if time.monotonic() >= give_up_at:
                raise ConfigError(f"teacher.urls: {url} is not ready after {cfg.start_timeout_s:g} s: {reason}")
            if not waited:
                logger.warning("waiting for the teacher server %s: %s", url, reason)
            waited = True
            time.sleep(cfg.backoff_s)


def is_repeated(status: int) -> bool:
    return status in BUSY or status >= 500


def token_of(cfg: HttpConfig) -> str:
    """Empty where there is none. Raises ConfigError."""
    return read_token("teacher.http.", cfg.token_file, cfg.token_env)


def client_settings(cfg: HttpConfig, token: str) -> dict:
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for every request
    return {
        "headers": {"Authorization": f"Bearer {token}"} if token else {},
        "timeout": httpx.Timeout(cfg.timeout_s, connect=cfg.connect_timeout_s, pool=None),
        # Servers close a connection that idles for 5 s: a request must not meet that.
        "limits": httpx.Limits(max_connections=None, keepalive_expiry=2.0),
        "trust_env": False,  # a cluster's proxy is for the internet, not for the next node
    }


def describe(error: httpx.RequestError) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def unread(error: Exception, response: httpx.Response) -> str:
    """Why an answer cannot be read, and how it begins where it is text."""
    media_type = response.headers.get("content-type", "")
    is_text = media_type.startswith(("text/", "application/json"))
    begins = f"; it begins {sentence(response)[:80]!r}" if is_text else ""
    return f"{type(error).__name__}: {plain(str(error))}{begins}"


def sentence(response: httpx.Response) -> str:
    """What the server says of an error, cut to a line."""
    return plain(response.text)


def plain(said: str) -> str:
    """One line that may go to a terminal, which obeys some characters."""
    return "".join(character for character in " ".join(said.split())[:500] if character.isprintable())
