"""The task of the quick start: its worked answers, its split, its tokenizer, and the copying student's texts."""

from importlib.resources import files
from itertools import islice

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

import make_pair
from opsd.config.run import DataConfig
from opsd.data.prompts import load_prompts
from pairs.sums import (
    COPYING_STUDENT,
    MAX_RESPONSE_TOKENS,
    SHOWN_SHARE,
    STUDENT,
    SUMS,
    TEACHER,
    Sum,
    draw,
    prompt_showing,
)
from pairs.task import EOS, EOS_ID, distinct, is_right, one_side
from pairs.training import texts_of


def test_worked_answer_of_the_documented_example():
    problem = Sum((7, 3, 9))
    assert (problem.prompt, problem.response, problem.answer) == ("7+3+9?", "7+3=10;10+9=19#19", "19")


def test_every_step_of_a_response_is_true_and_fits():
    for problem in islice(draw("steps"), 500):
        steps, _, final = problem.response.partition("#")
        assert int(final) == sum(problem.terms)
        for step, term in zip(steps.split(";"), problem.terms[1:], strict=True):
            left, _, right = step.partition("=")
            assert sum(map(int, left.split("+"))) == int(right) and left.endswith(f"+{term}")
        assert len(problem.response) + 1 <= MAX_RESPONSE_TOKENS


def test_training_never_sees_a_held_out_problem():
    held_out = {problem.prompt for problem in distinct(one_side(draw("a"), held_out=True), 800)}
    seen = {problem.prompt for problem in islice(one_side(draw("b"), held_out=False), 20_000)}
    assert len(held_out) == 800 and not held_out & seen


@pytest.mark.parametrize(
    ("response", "right"), [("7+3=10;10+9=19#19", True), ("#19", True), ("#18", False), ("19", False), ("#19#", False)]
)
def test_grading_reads_what_follows_the_last_mark(response, right):
    assert is_right(response, Sum((7, 3, 9))) is right


def test_saved_tokenizer_round_trips_one_token_a_character(tmp_path):
    SUMS.tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "7+3+9?7+3=10;10+9=19#19"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.encode(EOS) == [tokenizer.eos_token_id] == [EOS_ID]
    with pytest.raises(Exception, match="UNK"):  # the type that the tokenizers library raises
        tokenizer.encode("7 + x")


def test_what_the_student_was_shown_is_what_the_method_shows_it(tmp_path):
    """The pair is trained by one script and distilled by another program: their prompts must be the same."""
    problems = distinct(draw("shown"), 50)
    make_pair.write_rows(tmp_path / "train.jsonl", map(SUMS.row, problems))
    method = OmegaConf.load(str(files("tip.conf") / "method" / "opsd.yaml"))
    tokenizer = SUMS.tokenizer()
    prompts = load_prompts(
        str(tmp_path / "train.jsonl"), DataConfig(**method.data), tokenizer, max_prompt_tokens=72
    ).prompts
    for prompt, problem in zip(prompts, problems, strict=True):
        assert tokenizer.decode(prompt.scored_after) == prompt_showing(problem, problem.response)
        assert tokenizer.decode(prompt.token_ids) == problem.prompt


def shown(plan):
    """(prompt, response) of the plan's training texts."""
    for (prompt, _), (response, _) in texts_of(SUMS, plan, 0):
        yield prompt, response.removesuffix(EOS)


def test_a_share_of_the_students_texts_can_only_be_copied_and_none_of_the_other_models():
    student = COPYING_STUDENT
    stream = islice(one_side(draw("student 0"), held_out=False), 3000)
    copied = []
    for (prompt, response), problem in zip(islice(shown(student), 3000), stream, strict=True):
        if prompt == problem.prompt:
            assert response == problem.response
        else:
            assert prompt == problem.prompt + response + problem.prompt
            assert len(response) + 1 <= MAX_RESPONSE_TOKENS
            copied.append(is_right(response, problem))
    assert len(copied) / 3000 == pytest.approx(SHOWN_SHARE, abs=0.03)
    assert sum(copied) / len(copied) < 0.05
    for plan in (TEACHER, STUDENT):
        assert not any("=" in prompt for prompt, _ in islice(shown(plan), 500))
