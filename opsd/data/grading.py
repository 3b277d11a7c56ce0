"""Is an answer right, and what is it? One function for each kind of task, and one that judges a batch of rollouts.

Whatever the kind, a thought is no answer: see opsd.data.thoughts. What a response is searched for ends there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from opsd.data.math_process import MATH, Judgement
from opsd.data.numbers import in_plain_notation, number
from opsd.data.thoughts import after_thought, response_text

if TYPE_CHECKING:  # it loads torch, which those who only read answers do without
    from opsd.types import Rollout

Grader = Callable[[str, str], bool]  # response text, reference answer -> right
Extractor = Callable[[str], str | None]  # response text -> its final answer, normalised; None: it gives none

NOTHING = Judgement(right=False, value=None, gave_up=False)

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
}


def grader_of(setting: str, data_source: str) -> str | None:
    """The grader's name for a row: `setting`, or for auto that of its data_source; None: auto knows no such source."""
    if setting != "auto":
        return setting
    exact = VERL_GRADERS.get(data_source)
    kinds = ((source[:-1], name) for source, name in VERL_GRADERS.items() if source.endswith("*"))
    return exact or next((name for start, name in kinds if data_source.startswith(start)), None)


def judge_all(graders: Sequence[str], responses: Sequence[str], answers: Sequence[str | None]) -> list[Judgement]:
    """One judgement for each response by its own grader, against its reference answer (None: nothing is right).

    Each is independent of the others. An answer that takes longer than math_worker.LIMIT_S is given up: wrong.
    """
    judged, places, jobs = [NOTHING] * len(responses), [], []
    for place, (grader, response, answer) in enumerate(zip(graders, responses, answers, strict=True)):
        text = after_thought(response)
        if grader == "final_hash":
            judged[place] = _judge_hash(text, answer)
            continue
        expression = None if text is None else EXPRESSIONS[grader](text)
        if expression is not None:
            places.append(place)
            jobs.append((_reference(answer), in_plain_notation(expression)))
    for place, judgement in zip(places, MATH.judge(jobs), strict=True):
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
    if setting in ("auto", *EXPRESSIONS):
        MATH.start()
    try:
        yield
    finally:
        MATH.stop()


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


# Where each of the graders that leave the comparison to math-verify looks: in all of a text, or in a part of it.
EXPRESSIONS: dict[str, Callable[[str], str | None]] = {
    "math": with_percent_inside,
    "boxed": lambda text: last_box(with_percent_inside(text)),
    "answer_line": last_answer_line,
}


def _reference(answer: str | None) -> str | None:
    return None if answer is None else in_plain_notation(f"\\boxed{{{_after_hash(answer)}}}")


def _judge_hash(response: str | None, answer: str | None) -> Judgement:
    value = None if response is None else hash_answer(response)
    right = value is not None and answer is not None and value == _value(_after_hash(answer))
    return Judgement(right=right, value=value, gave_up=False)


def hash_answer(response: str) -> str | None:
    """What stands after the last '#': the number that its first line is, else the text; None: no '#'."""
    return _value(_after_hash(response)) if "#" in response else None


def _value(text: str) -> str:
    """Equal numbers give equal text: "18", "18.", "$18.00 a day" and "18\nDone" are all 18."""
    read = number(text.split("\n")[0])
    return text if read is None else str(read)


def _after_hash(text: str) -> str:
    return text.rpartition("#")[2].strip()


def _right(grader: str, response: str, answer: str) -> bool:
    return judge_all([grader], [response], [answer])[0].right


def _extracted(grader: str, response: str) -> str | None:
    """Equal values in the usual notations give equal text: 0.5, 1/2 and \\frac{1}{2} in a box are all '1/2'."""
    return judge_all([grader], [response], [None])[0].value


# final_hash: what stands after the last '#', as GSM8K writes '#### 18', compared as a number where both are numbers.
# math: the response's final expression, boxed or not, equals the reference, as math-verify sees it; boxed: that of the
# last \\boxed{} alone; answer_line: what stands after the last 'Answer:' of a line. An answer anywhere else is wrong.
GRADERS: dict[str, Grader | None] = {
    **{name: partial(_right, name) for name in ("final_hash", "math", "boxed", "answer_line")},
    "none": None,
}
EXTRACTORS: dict[str, Extractor] = {name: partial(_extracted, name) for name, grader in GRADERS.items() if grader}
