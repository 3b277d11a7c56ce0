"""What a command says: its progress, and the errors that a user can cause or must act on.

Everything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A setting is missing, mistyped, out of range or contradicts another. Raised before a model is loaded."""


class DataError(ValueError):
    """A file of the user's (prompts, weights, checkpoint) does not hold what it must; names the file and the row."""


class StageError(RuntimeError):
    """A stage of a running step failed (rollout, score, select, learn, sync); names the step and the worker."""


@contextmanager
def reported() -> Iterator[None]:
    """What a command does: our errors become one line on stderr and exit code 2; so does Ctrl-C, with exit code 130.

    A KeyboardInterrupt with a text, as a run raises it, says what is left.
    """
    try:
        yield
    except (ConfigError, DataError, StageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped", file=sys.stderr)
        sys.exit(130)


def say(line: str) -> None:
    """A line for the person at the terminal, at once: stdout is for results."""
    print(line, file=sys.stderr, flush=True)
