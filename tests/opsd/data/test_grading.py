"""The graders on answers as models write them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from opsd.data.grading import GRADERS, check_grader, judge_all, judge_rollouts, last_box
from opsd.data.math_process import MathProcess
from opsd.data.thoughts import MARKS
from opsd.errors import ConfigError
from opsd.types import Prompt, Rollout
from tests.tiny_models import make_char_tokenizer


def judged(grader, response, answer="7"):
    [judgement] = judge_all([grader], [response], [answer])
    return judgement


@pytest.mark.parametrize("name", GRADERS)
def test_every_grader_of_ours_passes_the_check(name):
    check_grader(name)


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("7+3=10;10+9=19#19", "19", True),
        ("7+3=10;10+9=19#18", "19", False),
        ("no mark 19", "19", False),
        ("he has 1,200 left. #### 1,200", "so 3*400 = 1200\n#### 1200", True),
        ("#19 #20", "19", False),
        ("#### 18.", "18", True),
        ("#### $1,800", "1800", True),
        ("#### 18\nDone", "18", True),
        ("#### 18", "18.0", True),
        ("#### -5", "\N{MINUS SIGN}5.00", True),
        ("#### 5", "-5", False),
        ("#### -$5", "-5", True),
        ("#### 1/2", "0.5", True),
        ("#### 3/0", "3/0", True),
        ("#### **18**", "18", True),
        ("#### 18 apples a day", "18", True),
        ("#### 18 km/h", "18", True),
        ("#### €18", "18 euros", True),
        ("#### 50%", "50", True),
        ("#### 18 or 19", "18", False),
        ("#### 18-19", "18", False),
        ("#### 18=18", "18", False),
        ("#### 1,8", "18", False),
        ("#### x", "x", True),
        ("#### Monday", "Tuesday", False),
        ("#### " + "1" * 5000, "1" * 5000, True),
        ("#### ", "", True),
    ],
)
def test_final_hash(response, answer, right):
    assert judged("final_hash", response, answer).right is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"so it is $\boxed{\frac{1}{2}}$", "0.5", True),
        (r"$\boxed{\left( 3, \frac{\pi}{2} \right)}$", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"nested braces: $\boxed{\frac{\sqrt{2}}{2}}$", r"\frac{1}{\sqrt{2}}", True),
        (r"$\boxed{7}$", "8", False),
        ("The answer is 18.", "9 * 2 = $<<9*2=18>>18\n#### 18", True),
        (r"\boxed{50\%}", "0.5", True),
        (r"\boxed{0.5}", r"50\%", True),
        (r"\boxed{50}", r"50\%", True),
        (r"\boxed{50\text{ percent}}", "0.5", True),
        (r"it is $\boxed{12.5}\%$.", "0.125", True),
        (r"\boxed{12.5}%", r"12.5\%", True),
        (r"so $\boxed{12.5}$ percent of them", r"12.5\%", True),
        (r"$\boxed{12.5}$, 3\% of it", "12.5", True),
        (r"$12.5\%$", r"\frac{1}{8}", True),
        (r"\boxed{12.5}", r"12.5\%", False),
        (r"\boxed{0.05}", r"50\%", False),
        (r"\boxed{18\text{ dollars}}", "18", True),
        (r"\boxed{18 dollars}", "18", True),
        ("it costs €18.", r"\$18", True),
        (r"\boxed{\pounds 1,800}", "1800", True),
        (r"\boxed{1\,800}", "1{,}800", True),
        (r"\boxed{801}", r"1\,800", False),
        (r"\boxed{1,\,800}", "1800", False),
    ],
)
def test_math(response, answer, right):
    assert judged("math", response, answer).right is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"first \boxed{7}, no: $\boxed{\frac{1}{2}}$.", "1/2", True),
        (r"first $\boxed{\frac{1}{2}}$, no: \boxed{7}", "1/2", False),
        ("it is 7", "7", False),
        (r"first \boxed{7}, then $\boxed{12.5}\%$", "1/8", True),
        (r"\boxed{7", "7", False),
        (r"\boxed{ \left\{ 1, \sqrt{2} \right\} }", r"\{\sqrt{2}, 1\}", True),
    ],
)
def test_boxed_is_the_last_box_and_nothing_else(response, answer, right):
    assert judged("boxed", response, answer).right is right


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
    assert judged("answer_line", response, answer).right is right


@pytest.mark.parametrize(
    ("name", "form"),
    [("math", r"it is \boxed{%s}"), ("boxed", r"\boxed{%s}"), ("answer_line", "Answer: %s"), ("final_hash", "#### %s")],
)
def test_a_thought_is_no_answer(name, form):
    six, seven = form % 6, form % 7
    for begin, end in MARKS:
        answered = [
            f"{begin}{six}{end}\n{seven}",
            f"{six}{end}{seven}",  # the prompt opened it
            f"{begin}{six}{end}{begin}{six}{end}{seven}",
            seven,
        ]
        unanswered = [f"{begin}{seven}", f"{begin}{six}{end}{begin}{seven}", f"{begin}{seven}{end}", f"{seven}{end}"]
        responses = [*answered, *unanswered]
        answers = judge_all([name] * 8, responses, ["7"] * 8)
        assert [(answer.right, answer.value) for answer in answers] == [(True, "7")] * 4 + [(False, None)] * 4


@pytest.mark.parametrize("are_special", [False, True])
def test_a_thought_is_recognised_where_its_marks_are_special_tokens_and_where_the_prompt_opens_it(
    tmp_path, are_special
):
    make_char_tokenizer(tmp_path, vocab_size=64, eos_token_id=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([AddedToken(mark, special=are_special) for mark in MARKS[0]], special_tokens=are_special)

    def is_right(prompt, response):
        ids = np.array([*tokenizer(response, add_special_tokens=False)["input_ids"], 0], np.int32)
        prompt = Prompt(index=0, token_ids=ids, text=prompt, answer="7", source="file")
        nothing = np.zeros((len(ids), 1), np.float32)
        rollout = Rollout(
            prompt=prompt, sample=0, response_ids=ids, sampled_logprobs=nothing[:, 0],
            candidate_ids=nothing.astype(np.int32), candidate_logprobs=nothing, stopped=True, policy_version=0,
        )  # fmt: skip
        return judge_rollouts([rollout], "final_hash", tokenizer)[0].right

    assert is_right("1+6=", "#7") and is_right("1+6=", "<think>#6</think>#7")
    assert not is_right("1+6=", "<think>#7</think>") and not is_right("1+6=", "<think>#7")
    assert is_right("1+6=<think>\n", "#6</think>#7") and not is_right("1+6=<think>\n", "#7")


def test_an_endless_answer_is_wrong_for_every_grader(monkeypatch):
    monkeypatch.setattr("opsd.data.grading.MATH", impatient := MathProcess(limit_s=0.2))
    tower = r"9^{9^{9^9}}"
    forms = {"math": "$%s$", "boxed": r"\boxed{%s}", "answer_line": "Answer: $%s$", "math_": r"7 or \boxed{%s}"}
    graders = [name.rstrip("_") for name in forms]
    answers = judge_all(graders, [form % tower for form in forms.values()], ["7"] * len(forms))
    assert [(answer.right, answer.value, answer.gave_up) for answer in answers] == [(False, None, True)] * len(forms)
    impatient.stop()


@pytest.mark.parametrize(
    ("name", "responses", "extracted"),
    [
        ("final_hash", ["so #### 1,200", "#1200", "#### $1200.00 a day"], "1200"),
        ("math", [r"\boxed{0.5}", "it is 1/2", r"$\frac{1}{2}$"], "1/2"),
        ("boxed", [r"\boxed{1,234}", r"1 \boxed{1234} 2"], "1234"),
        ("answer_line", ["Answer: 18", "9\nAnswer: $18$."], "18"),
    ],
)
def test_equal_answers_are_extracted_as_equal_text(name, responses, extracted):
    assert [judged(name, response).value for response in responses] == [extracted] * len(responses)
    assert judged(name, "I give up").value is None


OWN_GRADERS = """
from opsd.data.grading import Comparison, GRADERS


def exact(response, answer):
    return response.strip() == answer


def first_line(response, answer):
    return Comparison(answer, response.splitlines()[0])


GRADERS["exactly"] = exact
"""


def test_a_grader_of_ones_own_is_one_function_in_ones_own_module(tmp_path, monkeypatch):
    (tmp_path / "my_graders.py").write_text(OWN_GRADERS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_graders:exact", "my_graders:first_line"):
        check_grader(name)
    assert judged("my_graders:exact", "<think>8</think> 7 ").right and not judged("my_graders:exact", "7.0").right
    assert judged("my_graders:first_line", "$7.0$\n8").right and not judged("my_graders:first_line", "$8$\n7").right
    assert judged("exactly", "7").right  # what the module adds to the table has a name there
    monkeypatch.delitem(GRADERS, "exactly")
    with pytest.raises(ConfigError, match="data.grader=my_graders:nothing: my_graders has no nothing"):
        check_grader("my_graders:nothing")


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
        assert [a for a in answers if not judged(name, form % a, a).right] == []
    pairs = zip(answers, answers[1:] + answers[:1], strict=True)
    agreeing = [(a, b) for a, b in pairs if judged("boxed", rf"\boxed{{{a}}}", b).right]
    assert agreeing == [("5", "x=5"), ("7", "7"), ("3", "3")]
