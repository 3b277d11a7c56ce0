"""What a command says: its progress, and the errors that a user can cause or must act on.

Everything else is a bug and keeps its traceback: so do the ValueErrors of the checks below, which records make of
themselves.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


LONGEST_MESSAGE = 1000  # characters: a value that is quoted may be megabytes long


class ConfigError(ValueError):
    """A setting is missing, mistyped, out of range or contradicts another. Raised before a model is loaded."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


class DataError(ValueError):
    """A file of the user's (prompts, weights, checkpoint) does not hold what it must; names the file and the row."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


class StageError(RuntimeError):
    """A stage of a running step failed (rollout, score, select, learn, sync); names the step and the worker."""


class WorkerLost(StageError):
    """A worker's process is gone, or does not answer: its run may start again from a checkpoint."""


@contextmanager
def reported() -> Iterator[None]:
    """What a command does: our errors become one line on stderr and exit code 2; so does Ctrl-C, with exit code 130.

    A KeyboardInterrupt with a text, as a run raises it, says what is left. The process then ends at once: Python's last
    collection would go through all that was imported, for two seconds, and free nothing.
    """
    atexit.register(gc.freeze)
    try:
        yield
    except (ConfigError, DataError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped", file=sys.stderr)
        sys.exit(130)


def one_line(message: str) -> str:
    """Without line ends, and with its middle left out where it is long: names and values of a user's are quoted in it.

    What no terminal can show, a half of a surrogate pair, is written as its escape.
    """
    line = " ".join(message.splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")
    half = LONGEST_MESSAGE // 2
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} … {line[-half:]}"


def say(line: str) -> None:
    """A line for the person at the terminal, at once: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def expect_shape(name: str, array: np.ndarray | Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a record would hold an array of another shape."""
    if tuple(array.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(array.shape)}")


def expect_all(wanted: str, values_N: Tensor, holds_N: Tensor) -> None:
    """Raises ValueError with the first of the values that is not finite or for which `holds_N` is false."""
    wrong = (~(holds_N & values_N.isfinite())).nonzero()
    if len(wrong):
        raise ValueError(f"{wanted}, got {values_N[wrong[0, 0]].item()} at place {int(wrong[0, 0])} of {len(values_N)}")


def expect_places(name: str, index_N: Tensor) -> None:
    """Raises ValueError where these int64 are no places in a batch: from 0 on, ascending and distinct."""
    if len(index_N) and int(index_N[0]) < 0:
        raise ValueError(f"{name} must be places from 0 on, got {int(index_N[0])}")
    unordered = (index_N[1:] <= index_N[:-1]).nonzero()
    if len(unordered):
        place = int(unordered[0])
        pair = f"{int(index_N[place])} before {int(index_N[place + 1])}"
        raise ValueError(f"{name} must be ascending and distinct, got {pair}")


def common_names(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the parts know, in order. Raises ValueError where some of them know of it and others do not."""
    names = {name: sum(name in part for part in parts) for each in parts for name in each}
    for name, known in names.items():
        if known < len(parts):
            raise ValueError(f"{name} must be known of all {len(parts)} parts or of none, got {known}")
    return list(names)
