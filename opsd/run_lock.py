"""One run writes to a folder at a time: a file in it says which, and is touched while that run lives."""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opsd.errors import ConfigError, StageError, say

NAME = "run.lock"
BEAT_S = 10.0  # between two heartbeats
STALE_S = 90.0  # without one the run is taken to be gone; a file system may show them late


class RunLock:
    """Held by this process until it is released. Its file names host, process and a token of its own."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.token = uuid.uuid4().hex

    def holds(self) -> bool:
        """Whether the file is still this process's: one that was suspended for long may have lost it."""
        return _read(self.path).get("token") == self.token

    def require(self) -> None:
        """Raises StageError where another run has taken the folder over."""
        if not self.holds():
            other = _who(_read(self.path))
            raise StageError(f"output_dir={self.path.parent} is no longer this run's: {other} has taken it over")

    def take(self) -> str | None:
        """Make the file; a run that is gone loses it. Returns what to say of that run, if there was one.

        Raises ConfigError where another run is alive.
        """
        said = None
        while not self._create():
            found, age_s = _read(self.path), _age_s(self.path)
            gone = _is_gone(found, age_s)
            if gone is None:
                raise ConfigError(
                    f"output_dir={self.path.parent}: another run writes to it, {_who(found)}, last seen "
                    f"{age_s:.0f} s ago: end it, or choose another folder. A run that was killed on another machine is "
                    f"known to be gone after {STALE_S:.0f} s"
                )
            said = f"{_who(found)} {gone}"
            self._put_away(found)
        return said

    def beat(self) -> None:
        if self.holds():
            os.utime(self.path)

    def release(self) -> None:
        if self.holds():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Whether the file was not there."""
        try:
            with self.path.open("x") as file:
                file.write(json.dumps({"token": self.token, **_this_process()}))
        except FileExistsError:
            return False
        return True

    def _put_away(self, stale: dict[str, Any]) -> None:
        """Of two runs that find the same stale file, one renames it; a file that is another's by then goes back."""
        aside = self.path.with_name(f"{NAME}.{self.token}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) == stale:
            aside.unlink()
        else:
            aside.rename(self.path)


@contextmanager
def locked(folder: Path) -> Iterator[RunLock]:
    """Makes the folder, and holds it with a heartbeat. Raises ConfigError where it is another run's."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    taken = lock.take()
    if taken:
        say(f"lock    {taken}: its folder is taken over")
    ended = threading.Event()

    def keep_alive() -> None:
        while not ended.wait(BEAT_S):
            try:
                lock.beat()
            except OSError:  # a full or absent disk for a while; the next beat may do
                continue

    heart = threading.Thread(target=keep_alive, name="run-lock", daemon=True)
    heart.start()
    try:
        yield lock
    finally:
        ended.set()
        heart.join()
        lock.release()


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "born": _born(os.getpid())}


def _is_gone(found: dict[str, Any], age_s: float) -> str | None:
    """Why the run behind a lock cannot be alive, in a few words; None: it may be."""
    here = found.get("host") == socket.gethostname() and found.get("boot") == _boot() and _boot() is not None
    if here and _born(found.get("pid")) != found.get("born"):
        return "has ended without releasing it"
    if age_s > STALE_S:
        return f"was last seen {age_s:.0f} s ago"
    return None


def _boot() -> str | None:
    """Names this boot of this machine and the namespace of its process ids: a container has others. None: no Linux."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _born(pid: Any) -> str | None:
    """When a process started, in the kernel's ticks; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(path: Path) -> dict[str, Any]:
    """What a lock says; nothing where there is none, or it is no lock."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _age_s(path: Path) -> float:
    """Seconds since the last heartbeat, by the file system's own clock: two machines' may differ."""
    probe = path.with_name(f"{NAME}.{uuid.uuid4().hex}.now")
    try:
        probe.touch()
        return max(0.0, probe.stat().st_mtime - path.stat().st_mtime)
    except FileNotFoundError:  # released meanwhile
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _who(found: dict[str, Any]) -> str:
    return f"process {found.get('pid', '?')} on {found.get('host', 'an unknown host')}"
