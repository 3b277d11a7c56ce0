"""Is an answer right, and what is it? A function for each kind of task, in `GRADERS`, and one that judges a batch.

    GRADERS[name](response, reference answer) -> bool | Judgement | Comparison

What is compared in Python says so itself: with a bool, or, where the answer's value is to count in a majority, or it is
worth a score between right and wrong, with a Judgement. A Comparison leaves it to math-verify, in a process of its own:
see opsd.data.math_process.
Whatever the kind, a thought is no answer: see opsd.data.thoughts. The response that a grader gets begins after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from opsd.config.checks import function_named
from opsd.data.deepplanning.scorer import grade
from opsd.data.deepplanning.task import read_task
from opsd.data.math_process import MATH, Judgement
from opsd.data.numbers import in_plain_notation, number
from opsd.data.thoughts import after_thought, response_text
from opsd.errors import ConfigError

if TYPE_CHECKING:  # it loads torch, which those who only read answers do without
    from opsd.types import Rollout


class Comparison(NamedTuple):
    """Two texts in which math-verify looks for an expression; the answer is right where they hold equal ones."""

    reference: str
    expression: str


Verdict = bool | Judgement | Comparison
Grader = Callable[[str, str], Verdict]

NOTHING = Judgement(right=False, value=None, gave_up=False)
MADE_UP_RESPONSE = "#### 1\nAnswer: $\\boxed{1}$"  # in which each of GRADERS finds an answer

# Where verl grades a row by its data_source: the grader that reads what verl's function of that source reads.
VERL_GRADERS = {
    "openai/gsm8k": "final_hash",
    "lighteval/MATH": "boxed",
    "DigitalLearningGmbH/MATH-lighteval": "boxed",
    "HuggingFaceH4/MATH-500": "boxed",
    "math_dapo": "answer_line",
    "math_dapo_reasoning": "answer_line",
    "math": "answer_line",
    "aime*": "answer_line",
    "numina_*": "boxed",
    "deepplanning_*": "deepplanning",  # not verl's
}


def grader_of(setting: str, data_source: str) -> str | None:
    """The grader's name for a row: `setting`, or for auto that of its data_source; None: auto knows no such source."""
    if setting != "auto":
        return setting
    exact = VERL_GRADERS.get(data_source)
    kinds = ((source[:-1], name) for source, name in VERL_GRADERS.items() if source.endswith("*"))
    return exact or next((name for start, name in kinds if data_source.startswith(start)), None)


def grader_named(setting: str) -> Grader:
    """An entry of GRADERS, or the user's own function as package.module:function. Raises ConfigError."""
    if ":" in setting:
        return function_named("data.grader", setting, takes="response, reference answer")
    if setting not in GRADERS:
        known = ", ".join([*GRADERS, "auto", "none"])
        raise ConfigError(f"data.grader must be one of {known} or a package.module:function, got {setting!r}")
    return GRADERS[setting]


def check_grader(setting: str) -> None:
    """Raises ConfigError where `setting` (data.grader) names no grader, or one whose verdict is none."""
    if setting in ("auto", "none"):
        return
    verdict = grader_named(setting)(MADE_UP_RESPONSE, "1")
    if not isinstance(verdict, Verdict):
        got = type(verdict).__name__
        raise ConfigError(f"data.grader={setting} must return a bool, a Judgement or a Comparison, got {got}")


def judge_all(graders: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]) -> list[Judgement]:
    """One judgement for each response by its own grader, against its reference answer (None: nothing is right).

    Each is independent of the others. A comparison that takes longer than math_worker.LIMIT_S is given up: wrong.
    """
    judged, comparisons = [NOTHING] * len(responses), {}
    for place, (grader, response, answer) in enumerate(zip(graders, responses, answers, strict=True)):
        text = after_thought(response)
        if text is None or answer is None:
            continue
        verdict = grader_named(grader)(text, answer)
        if isinstance(verdict, Comparison):
            comparisons[place] = verdict
        else:
            judged[place] = verdict if isinstance(verdict, Judgement) else NOTHING._replace(right=bool(verdict))
    for place, judgement in zip(comparisons, MATH.judge(list(comparisons.values())), strict=True):
        judged[place] = judgement
    return judged


def judge_rollouts(rollouts: Sequence[Rollout], setting: str, tokenizer: Any) -> list[Judgement]:
    """One judgement for each rollout, by `setting` (data.grader, not "none") or what it means for the rollout's row."""
    return judge_all(
        # A row that auto knows no grader for is refused when the prompts are read.
        [grader_of(setting, rollout.prompt.data_source) or setting for rollout in rollouts],
        [response_text(rollout, tokenizer) for rollout in rollouts],
        [rollout.prompt.answer for rollout in rollouts],
    )


@contextmanager
def ready_to_judge(setting: str) -> Iterator[None]:
    """Starts what `setting` (data.grader) needs, without waiting for it, and ends it."""
    if setting == "auto" or (
        setting != "none" and isinstance(grader_named(setting)(MADE_UP_RESPONSE, "1"), Comparison)
    ):
        MATH.start()
    try:
        yield
    finally:
        MATH.stop()


def final_hash(response: str, answer: str) -> Judgement:
    """What stands after the last '#', as GSM8K writes '#### 18', compared as a number where both are numbers."""
    value = _value(_after_hash(response)) if "#" in response else None
    return Judgement(right=value is not None and value == _value(_after_hash(answer)), value=value, gave_up=False)


def final_expression(response: str, answer: str) -> Verdict:
    """The response's final expression, boxed or not, as math-verify finds it."""
    return _compared(with_percent_inside(response), answer)


def final_box(response: str, answer: str) -> Verdict:
    """The last \\boxed{} alone: an answer anywhere else is wrong."""
    return _compared(last_box(with_percent_inside(response)), answer)


def answer_line(response: str, answer: str) -> Verdict:
    """What stands after the last 'Answer:' of a line: an answer anywhere else is wrong."""
    return _compared(last_answer_line(response), answer)


GRADERS: dict[str, Grader] = {
    "final_hash": final_hash,
    "math": final_expression,
    "boxed": final_box,
    "answer_line": answer_line,
    "deepplanning": grade,
}
# What a grader needs its reference answer to be: raises ValueError for another, when the prompts are read.
REFERENCES: dict[str, Callable[[str], object]] = {"deepplanning": read_task}


def last_box(text: str) -> str | None:
    """The last \\boxed{...} of `text` with its own braces balanced; None: there is none, or it is not closed."""
    found = _last_box(text)
    return None if found is None else found[0]


def with_percent_inside(text: str) -> str:
    """`text` with the percent sign behind its last box in the box: \\boxed{50}\\% is \\boxed{50\\%}."""
    found = _last_box(text)
    if found is None:
        return text
    _, end = found
    sign = re.match(r"\s*\$?\s*(?:\\?%|(?:\\text\s*\{)?\s*per\s?cent\b\s*\}?)", text[end:])
    if sign is None:
        return text
    return rf"{text[: end - 1]}\%}}{text[end + sign.end() :]}"


def _last_box(text: str) -> tuple[str, int] | None:
    """It, and where it ends."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            end = start + brace.end()
            return text[start:end], end
    return None


def last_answer_line(text: str) -> str | None:
    """What stands after the last 'Answer:' to the end of its line, as an expression; None: there is none."""
    found = re.findall(r"(?i)\banswer\s*:\s*(.*)", text)
    if not found:
        return None
    answer = found[-1].strip("* ").rstrip(".* ")
    is_marked = re.search(r"(?<!\\)\$|\\boxed", answer)
    return answer if is_marked else f"\\boxed{{{answer}}}"


def _compared(text: str | None, answer: str) -> Verdict:
    """The question to math-verify; None: the response has no answer."""
    if text is None:
        return NOTHING
    return Comparison(in_plain_notation(f"\\boxed{{{_after_hash(answer)}}}"), in_plain_notation(text))


def _value(text: str) -> str:
    """Equal numbers give equal text: "18", "18.", "$18.00 a day" and "18\nDone" are all 18."""
    read = number(text.split("\n")[0])
    return text if read is None else str(read)


def _after_hash(text: str) -> str:
    return text.rpartition("#")[2].strip()
