"""The graders on answers as models write them."""

import json
import os
from pathlib import Path

import pytest

from opsd.config import GRADERS as NAMES
from opsd.data.grading import EXTRACTORS, GRADERS, last_box


def test_every_grader_can_be_configured_and_says_what_it_read():
    assert tuple(GRADERS) == NAMES
    assert {*EXTRACTORS, "none"} == set(GRADERS)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("7+3=10;10+9=19#19", "19", True),
        ("7+3=10;10+9=19#18", "19", False),
        ("no mark 19", "19", False),
        ("he has 1,200 left. #### 1,200", "so 3*400 = 1200\n#### 1200", True),
        ("#19 #20", "19", False),
    ],
)
def test_final_hash(response, answer, right):
    assert GRADERS["final_hash"](response, answer) is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", True),
        (r"$\boxed{\left( 3, \frac{\pi}{2} \right)}$", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"nested braces: $\boxed{\frac{\sqrt{2}}{2}}$", r"\frac{1}{\sqrt{2}}", True),
        (r"$\boxed{7}$", "8", False),
        ("The answer is 18.", "9 * 2 = $<<9*2=18>>18\n#### 18", True),
    ],
)
def test_math(response, answer, right):
    assert GRADERS["math"](response, answer) is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"first \boxed{7}, no: $\boxed{\frac{1}{2}}$.", "1/2", True),
        (r"first $\boxed{\frac{1}{2}}$, no: \boxed{7}", "1/2", False),
        ("it is 7", "7", False),
        (r"\boxed{7", "7", False),
        (r"\boxed{ \left\{ 1, \sqrt{2} \right\} }", r"\{\sqrt{2}, 1\}", True),
    ],
)
def test_boxed_is_the_last_box_and_nothing_else(response, answer, right):
    assert GRADERS["boxed"](response, answer) is right


def test_a_box_may_hold_braces_in_braces_and_escaped_ones():
    assert last_box(r"a \boxed{\frac{\sqrt{2}}{3}} b") == r"\boxed{\frac{\sqrt{2}}{3}}"
    assert last_box(r"\boxed{\left\{ x \right.}") == r"\boxed{\left\{ x \right.}"
    assert last_box("no box") is None


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("9 + 9 = 18\n\nAnswer: 18", "18", True),
        ("**Answer:** $\\frac{1}{2}$.", "0.5", True),
        ("Answer: 17. Wait.\nanswer: 18.", "18", True),
        ("it is 18", "18", False),
        ("Answer: 17\nOr 18", "18", False),
        ("Answer: ", "18", False),
        (r"Answer: 6 - 5i", "6 - 5i", True),
    ],
)
def test_answer_line_is_what_stands_after_the_last_one(response, answer, right):
    assert GRADERS["answer_line"](response, answer) is right


@pytest.mark.parametrize(
    ("name", "responses", "extracted"),
    [
        ("final_hash", ["so #### 1,200", "#1200"], "1200"),
        ("math", [r"\boxed{0.5}", "it is 1/2", r"$\frac{1}{2}$"], "1/2"),
        ("boxed", [r"\boxed{1,234}", r"1 \boxed{1234} 2"], "1234"),
        ("answer_line", ["Answer: 18", "9\nAnswer: $18$."], "18"),
    ],
)
def test_equal_answers_are_extracted_as_equal_text(name, responses, extracted):
    assert [EXTRACTORS[name](response) for response in responses] == [extracted] * len(responses)
    assert EXTRACTORS[name]("I give up") is None


def test_math500s_answers_agree_with_themselves():
    """All 500, in the three ways in which a model may write them; and with the next one's where it is equal."""
    folder = os.environ.get("MATH500_DIR")
    if folder is None:
        pytest.skip("set MATH500_DIR to a folder with MATH-500's test.jsonl")
    answers = [json.loads(line)["answer"] for line in (Path(folder) / "test.jsonl").read_text().splitlines()]
    forms = {
        "math": r"so it is $\boxed{%s}$.",
        "boxed": r"not \boxed{7} but \boxed{%s}",
        "answer_line": "7\nAnswer: %s",
    }
    for name, form in forms.items():
        assert [a for a in answers if not GRADERS[name](form % a, a)] == []
    pairs = zip(answers, answers[1:] + answers[:1], strict=True)
    agreeing = [(a, b) for a, b in pairs if GRADERS["boxed"](rf"\boxed{{{a}}}", b)]
    assert agreeing == [("5", "x=5"), ("7", "7"), ("3", "3")]
