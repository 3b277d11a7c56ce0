"""The process that gpu_check.py runs its parts in: what breaks the device, hangs or dies there costs one part."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gpu_parts import Part

ROOT = f"{Path(__file__).resolve().parents[2]}/"
Outcome = dict[str, Any]  # status: passed | failed | measured; seconds; result or error


class PartsWorker:
    """One process for all parts, so that torch and transformers are imported once; a new one where it is lost."""

    def __init__(self) -> None:
        self.process = None

    def run(self, part: Part, limit_s: float) -> Outcome:
        if self.process is None:
            self._start()
        began = time.monotonic()
        try:
            self.connection.send(part)
            if not self.connection.poll(limit_s):
                self.close()
                outcome = {"status": "failed", "error": f"not done within the {limit_s:.0f} s that were left"}
            else:
                outcome = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            outcome = {"status": "failed", "error": f"its process ended with exit code {self.process.exitcode}"}
            self.close()
        return {**outcome, "seconds": round(time.monotonic() - began, 2)}

    def close(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):  # it has ended, or has not come to make its group
                os.killpg(self.process.pid, signal.SIGKILL)  # engines that a part started are of this group
            self.process.kill()
            self.process.join()
            self.process = None

    def _start(self) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the file


def serve(connection: Connection) -> None:
    os.setpgid(0, 0)
    while True:
        try:
            part = connection.recv()
        except EOFError:
            return
        connection.send(outcome_of(part))
        free_memory()


def outcome_of(part: Part) -> Outcome:
    try:
        module, function = part.function.split(":")
        result = getattr(importlib.import_module(module), function)(**part.options)
    except Exception as error:  # this process's edge: whatever it is, it is recorded, and the other parts continue
        [*_, line] = traceback.format_exception_only(error)
        first, *_ = line.strip().splitlines() or [type(error).__name__]
        return {"status": "failed", "error": first, "traceback": traceback.format_exc().replace(ROOT, "")}
    if not part.is_check:
        return {"status": "measured", "result": result}
    rows = [{**asdict(check), "passed": check.passed} for check in result]
    return {"status": "passed" if all(row["passed"] for row in rows) else "failed", "result": rows}


def free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")  # the next part may not need it either
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
