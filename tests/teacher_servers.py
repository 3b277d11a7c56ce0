"""Real teacher servers for tests: processes of their own on free ports, ended with the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "the-token"


def make_models(root: Path) -> None:
    """Folders of two teachers, "teacher" and "other", and of a "student"."""
    for name, tied, layers, seed in (("teacher", False, 3, 1), ("other", False, 3, 7), ("student", True, 2, 2)):
        make_tiny_qwen3(root / name, tied=tied, layers=layers, seed=seed, eos_token_id=0, scale=2.0)
        make_char_tokenizer(root / name, eos_token_id=0)


@contextmanager
def client_token() -> Iterator[None]:
    """The clients of this process send TOKEN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPSD_TEACHER_TOKEN", TOKEN)
        yield


@dataclass(kw_only=True)
class ServerProcess:
    url: str
    process: subprocess.Popen
    output: list[str]  # lines so far

    def end(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()


@contextmanager
def teacher_server(path: Path | str, *overrides: str, token: str = "", backend: str = "transformers"):
    """Yields a ServerProcess that has loaded its model."""
    command = [sys.executable, "-m", "opsd.teacher.server", "port=0", "device=cpu", f"teacher.path={path}"]
    command += [f"teacher.backend={backend}", "teacher.kv_cache_gib=0.05", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OPSD_TEACHER_TOKEN": token}
    with running(command, environment, ready="ready ") as server:
        yield server


@contextmanager
def running(command: list[str], environment: dict[str, str], ready: str, url: str = "") -> Iterator[ServerProcess]:
    """A process that prints a line with `ready` when it can be asked, followed by its address where `url` is empty."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output: list[str] = []
    found = threading.Event()

    def read() -> None:
        for line in process.stdout:
            output.append(line)
            if ready in line:
                found.set()
        found.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert found.wait(timeout=300), "".join(output)
        lines = [line for line in output if ready in line]
        assert lines, "".join(output)
        yield ServerProcess(url=url or lines[0].partition(ready)[2].strip(), process=process, output=output)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the process has started, too
        process.wait()
        reader.join(timeout=30)
