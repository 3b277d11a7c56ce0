"""Where a run can be looked at, and from where: Ray's dashboard and the metrics listen on different addresses."""

from __future__ import annotations

import ipaddress
import socket
import time
from urllib.parse import urlsplit

from opsd.errors import StageError


def reachable_lines(dashboard: str, metrics: str) -> list[str]:
    """`dashboard`: its address, or '' for none. `metrics`: where Ray's agent on this node serves them.

    Ray's agent listens on the node's own address, whatever the dashboard does.
    """
    lines = ["ray     no dashboard"]
    if dashboard:
        lines = [f"ray     {dashboard} ({reach(dashboard)}; its token: ray get-auth-token)"]
    return [*lines, f"metrics {metrics} ({reach(metrics)}; for Prometheus)"]


def reach(url: str) -> str:
    """Who can open this address, in words."""
    host = urlsplit(url).hostname or ""
    port = urlsplit(url).port
    if is_loopback(host):
        return f"from this machine only; from yours: ssh -L {port}:{host}:{port} THIS_MACHINE, then the same address"
    return "from every machine that reaches this one"


def require_answer(address: str, wait_s: float = 15.0) -> None:
    """Raises StageError unless something takes connections at `address` (host:port; others, as `auto`, Ray looks up).

    Ray itself tries for five minutes before it says so.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        return
    deadline = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=wait_s).close()
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline or isinstance(error, (socket.gaierror, OverflowError)):
                raise StageError(f"ray: nothing answers at RAY_ADDRESS={address} ({error})") from error
            time.sleep(0.5)
        else:
            return


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
