"""What a run warns of: one line per kind, however often it comes, and a count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from opsd.errors import say


class Warned:
    """The warnings of one run by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def warn(self, kind: str, line: str) -> None:
        """Says the line, where it is the first of its kind."""
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            say(f"warning: {line}")

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """For a write that a run can do without: whatever fails in it is a warning and a count, and the run goes on."""
        try:
            yield
        except Exception as error:  # of files, wandb, Ray or a plot: none of them is worth the training
            said = " ".join(str(error).split()) or "no reason given"
            self.warn(what, f"{what} failed, and the run goes on: {type(error).__name__}: {said}")
