"""New weights that reach an engine while it works: left by one thread, taken by the engine between two steps."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from opsd.errors import StageError


class Incoming:
    """The newest weights that the engine has not taken in. Older ones that it never took are forgotten."""

    def __init__(self) -> None:
        self._newest: deque[tuple[dict[str, Tensor], int]] = deque(maxlen=1)  # its calls are atomic

    def leave(self, named: dict[str, Tensor], policy_version: int) -> None:
        """A full Hugging Face state dict, from any thread."""
        self._newest.append((named, policy_version))

    def __bool__(self) -> bool:
        return bool(self._newest)

    def take(self) -> tuple[dict[str, Tensor], int]:
        """In the thread of the engine, where there are some."""
        return self._newest.pop()


def require_version(held: int, asked: int, *, or_newer: bool) -> None:
    """Raises StageError where the weights that an engine holds are not those that it is asked to answer with.

    `or_newer`: newer ones will do, as with schedule.partial_rollouts.
    """
    if held != asked and not (or_newer and held > asked):
        newer = " or a newer one" if or_newer else ""
        raise StageError(f"asked for policy version {asked}{newer}, the engine holds {held}")
