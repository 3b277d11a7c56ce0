"""How a run reaches a teacher behind HTTP: time limits, retries, where the token is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from opsd.config.checks import at_least, seconds
from opsd.errors import ConfigError

HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9a-fA-F:.]+(%[\w.-]+)?")  # a name, or an IPv4 or IPv6 address


@dataclass
class HttpConfig:
    """The client's side. The token itself is never a setting: settings are written into the run's folder."""

    token_env: str = "OPSD_TEACHER_TOKEN"  # environment variable with the bearer token; unset: none is sent
    token_file: str = ""  # file with the token, before the variable; empty: none
    max_in_flight: int = 16  # requests that one server gets at once
    connect_timeout_s: float = 10.0  # for a connection to a server
    timeout_s: float = 600.0  # for one answer; a server that takes longer counts as dead
    backoff_s: float = 0.5  # before a server that failed is asked again; doubles with every failure
    max_backoff_s: float = 30.0  # up to this
    give_up_after_s: float = 300.0  # a request that no server has answered by then ends the run
    start_timeout_s: float = 1800.0  # how long a run waits for servers that still load their model

    def __post_init__(self) -> None:
        at_least("teacher.http.max_in_flight", self.max_in_flight, 1)
        for name in vars(self):
            if name.endswith("_s"):
                seconds(f"teacher.http.{name}", getattr(self, name))


def check_url(field: str, url: str) -> None:
    """Raises ConfigError unless it is http(s)://host[:port][/path] without a password."""
    wanted = f"{field} must hold addresses such as http://host:8100"
    if "@" in url:  # before anything quotes the address
        raise ConfigError(
            f"{field} must hold no user or password ({url.rpartition('@')[2]}): give a token in teacher.http"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # a port of letters or beyond 65535, a bracket that is not closed
        raise ConfigError(f"{wanted}, got {url!r}: {error}") from error
    # urlsplit drops tabs and line ends silently, and takes anything for a host.
    is_plain = HOST.fullmatch(parts.hostname or "") and not re.search(r"\s", url) and url.isprintable()
    if parts.scheme not in ("http", "https") or not is_plain or port == 0 or parts.query or parts.fragment:
        raise ConfigError(f"{wanted}, got {url!r}")
