"""Is an answer right? One function a kind of task."""

from __future__ import annotations

import re
from collections.abc import Callable

Grader = Callable[[str, str], bool]  # response text, reference answer -> right


def final_hash(response: str, answer: str) -> bool:
    """What stands after the last '#' equals what stands after the reference's last '#' (GSM8K writes '#### 18')."""
    if "#" not in response:
        return False
    return _after_hash(response) == _after_hash(answer)


def math(response: str, answer: str) -> bool:
    """The response's final (boxed) expression equals the reference, as math-verify sees it."""
    from math_verify import parse, verify

    return verify(parse(f"\\boxed{{{_after_hash(answer)}}}"), parse(response))


def _after_hash(text: str) -> str:
    """The final answer, without thousands separators; commas of tuples and lists stay."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.rpartition("#")[2].strip())


GRADERS: dict[str, Grader | None] = {"final_hash": final_hash, "math": math, "none": None}
