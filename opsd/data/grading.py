"""Is an answer right, and what is it? One function of each sort for a kind of task."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

Grader = Callable[[str, str], bool]  # response text, reference answer -> right
Extractor = Callable[[str], str | None]  # response text -> its final answer, normalised; None: it gives none


def final_hash(response: str, answer: str) -> bool:
    """What stands after the last '#' equals what stands after the reference's last '#' (GSM8K writes '#### 18')."""
    return hash_answer(response) == _without_separators(_after_hash(answer))


def hash_answer(response: str) -> str | None:
    return _without_separators(_after_hash(response)) if "#" in response else None


def math(response: str, answer: str) -> bool:
    """The response's final expression, boxed or not, equals the reference, as math-verify sees it."""
    return _is_equal(response, answer)


def math_answer(response: str) -> str | None:
    """Equal values in the usual notations give equal text: 0.5, 1/2 and \\frac{1}{2} are all '1/2'."""
    parsed = _parse(response)
    return str(parsed[0]) if parsed else None


def boxed(response: str, answer: str) -> bool:
    """As `math`, for the last \\boxed{} alone: an answer outside of a box is wrong."""
    box = last_box(response)
    return box is not None and _is_equal(box, answer)


def boxed_answer(response: str) -> str | None:
    box = last_box(response)
    return None if box is None else math_answer(box)


def answer_line(response: str, answer: str) -> bool:
    """As `math`, for what stands after the last 'Answer:' of a line: an answer anywhere else is wrong."""
    line = last_answer_line(response)
    return line is not None and _is_equal(line, answer)


def answer_line_answer(response: str) -> str | None:
    line = last_answer_line(response)
    return None if line is None else math_answer(line)


def last_box(text: str) -> str | None:
    """The last \\boxed{...} of `text` with its own braces balanced; None: there is none, or it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start : start + brace.end()]
    return None


def last_answer_line(text: str) -> str | None:
    """What stands after the last 'Answer:' to the end of its line, as an expression; None: there is none."""
    found = re.findall(r"(?i)\banswer\s*:\s*(.*)", text)
    if not found:
        return None
    answer = found[-1].strip("* ").rstrip(".* ")
    is_marked = re.search(r"(?<!\\)\$|\\boxed", answer)
    return answer if is_marked else f"\\boxed{{{answer}}}"


def _is_equal(response: str, answer: str) -> bool:
    from math_verify import verify

    return verify(_parse(f"\\boxed{{{_after_hash(answer)}}}"), _parse(response))


@lru_cache(maxsize=1024)
def _parse(text: str) -> list[Any]:
    """math-verify's reading: an expression and its text, or nothing. Kept, as graded answers are extracted too."""
    from math_verify import parse

    return parse(text)


def _after_hash(text: str) -> str:
    return text.rpartition("#")[2].strip()


def _without_separators(number: str) -> str:
    """Without the commas that group digits by three; those of tuples and lists stay."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", number)


GRADERS: dict[str, Grader | None] = {
    "final_hash": final_hash,
    "math": math,
    "boxed": boxed,
    "answer_line": answer_line,
    "none": None,
}
EXTRACTORS: dict[str, Extractor] = {
    "final_hash": hash_answer,
    "math": math_answer,
    "boxed": boxed_answer,
    "answer_line": answer_line_answer,
}
