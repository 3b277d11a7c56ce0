"""What an evaluation keeps of every problem: a line of JSON, written by `opsd.evaluate`, read to compare runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opsd.data.rows import read_rows
from opsd.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a trajectory, with special tokens."""

    wrote: str  # the model
    read: str  # what tools and the chat template put behind it; empty: it was the last turn


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """How an answer with tools came about; see opsd.sequences.Trajectory."""

    turns: tuple[Turn, ...]
    end: str
    num_calls: int
    failures: dict[str, int]
    num_read: int  # tokens behind the prompt, those of tools and template between the turns among them


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to a problem."""

    text: str  # without special tokens; with tools of the last turn, which is graded
    extracted: str | None  # the final answer, normalised; None: none found, or no grader
    correct: bool | None  # None: no grader
    tokens: int  # the model's own, stop tokens included
    truncated: bool  # it hit the length limit
    score: float | None = None  # [0, 1]; None: right or wrong is all that the grader says
    parts: dict[str, float] | None = None  # what the score is made of; None: as score, or there was nothing to score
    tool_use: ToolUse | None = None  # None: it had no tools


@dataclass(frozen=True, kw_only=True)
class ProblemResult:
    """One problem and all answers to it."""

    data_source: str
    row: int  # of its file, from 0
    reference: str | None
    prompt: str  # as the model saw it
    answers: tuple[Answer, ...]  # at least one

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError("it has no answers")

    @property
    def num_correct(self) -> int:
        return sum(bool(answer.correct) for answer in self.answers)

    @property
    def scores(self) -> list[float]:
        """Of every answer: its score, or 1 for right and 0 for wrong."""
        return [float(bool(answer.correct)) if answer.score is None else answer.score for answer in self.answers]

    @property
    def identity(self) -> tuple[str, int, str | None]:
        """Equal for the same problem in two evaluations, however it was put to the model."""
        return self.data_source, self.row, self.reference


def write_results(path: Path, results: Iterable[ProblemResult]) -> None:
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results), encoding="utf-8")


def read_results(path: str | Path) -> list[ProblemResult]:
    """Raises DataError that names the file and the line where it is not what `write_results` writes."""
    results = []
    for row in read_rows(path):
        try:
            answers = tuple(map(_answer, row.fields["answers"]))
            results.append(ProblemResult(**{**row.fields, "answers": answers}))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{row.where}: not a problem's result as opsd.evaluate writes it ({error})") from error
    return results


def _answer(fields: dict[str, Any]) -> Answer:
    used = dict(fields).get("tool_use")
    if used is not None:
        used = ToolUse(**{**used, "turns": tuple(Turn(**turn) for turn in used["turns"])})
    return Answer(**{**fields, "tool_use": used})
