"""Processes that an engine's process starts end with it, however it ended."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it by `multiprocessing` is gone; without such a one: nothing.

    A killed server or actor must not leave its engine, and the memory that it holds, behind. vLLM's own workers look
    for their parent's end only once their model is loaded, and not in the middle of a step.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True, name="EndWithParent").start()


def _wait_and_exit(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
