"""One process of tools, as who started it sees it."""

from __future__ import annotations

import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Pipe
from typing import Any

from opsd.errors import ConfigError

START_S = 300.0  # to import and build a user's tools


class ProcessHandle:
    """Starts it, tells it of calls and closes, and hears its answers, in two threads of its own."""

    def __init__(
        self,
        setup: tuple[str, dict[str, Any], int],
        *,
        answered: Callable[[ProcessHandle, int, str, bool, str], None],
        ended: Callable[[ProcessHandle], None],
    ) -> None:
        """`setup`: tools.build, its options, the most characters of an answer. Does not wait. `answered` and `ended`
        are called from another thread."""
        self.num_open = 0  # trajectories
        self.num_hung = 0  # calls that have not returned, of trajectories that are over
        self.has_ended = False
        self.schemas: list[dict[str, Any]] = []
        self.ready_at = math.inf  # time.monotonic()
        self.silent_since = math.inf  # where it was asked for a sign of life and has given none
        self._answered, self._ended = answered, ended
        self._failed = f"it has not started within {START_S:g} s"
        self._heard = threading.Event()  # whether it has started
        self._to_send: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._pipe, its_end = Pipe()
        paths = os.pathsep.join(path for path in sys.path if path)
        # A session of its own: Ctrl-C is not for it, and it ends when the pipe closes.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "opsd.agents.tool_process", str(its_end.fileno())],
            pass_fds=[its_end.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )
        its_end.close()
        self._to_send.put(setup)
        for task in (self._write, self._read):
            threading.Thread(target=task, name=f"tools {self._process.pid}", daemon=True).start()

    def wait_ready(self) -> None:
        """Raises ConfigError where the tools cannot be built."""
        if not self._heard.wait(START_S) or not self.schemas:
            self.end()
            raise ConfigError(self._failed)

    def send(self, *message: Any) -> None:
        """Does not wait, also where the process reads nothing."""
        self._to_send.put(message)

    def ping(self, now: float) -> None:
        if self.silent_since == math.inf:
            self.silent_since = now
            self.send("ping")

    def end(self) -> None:
        """Kills it: a call that holds Python's lock cannot be asked to end."""
        self._process.kill()

    def _write(self) -> None:
        with suppress(OSError, ValueError):  # it is gone: its reader says so
            while (message := self._to_send.get()) is not None:
                self._pipe.send(message)

    def _read(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                what, *rest = self._pipe.recv()
                self.silent_since = math.inf
                if what == "answer":
                    number, told = rest
                    self._answered(self, number, *told)
                elif what == "ready":
                    self.schemas, self.ready_at = rest[0], time.monotonic()
                    self._heard.set()
                elif what == "failed":
                    self._failed = rest[0]
        self.has_ended = True
        self._to_send.put(None)
        self._process.kill()
        code = self._process.wait()
        if not self._heard.is_set() and self._failed.startswith("it has not"):
            self._failed = f"tools.build: its process ended with exit code {code} before the tools were built"
        self._heard.set()
        self._ended(self)
        self._pipe.close()
