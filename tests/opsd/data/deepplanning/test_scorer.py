"""From an answer to its score: the halves, the parts, and what the grader's entry makes of both."""

import string
import time

import pytest
from transformers import AutoTokenizer

from opsd.config.run import PromptConfig
from opsd.data.deepplanning.scorer import DIMENSIONS, grade
from opsd.data.grading import check_grader, judge_all
from opsd.data.prompts import student_prompts
from opsd.data.rows import Row
from opsd.errors import DataError
from tests.opsd.data.deepplanning.world import PLAN
from tests.tiny_models import make_char_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token per character."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_char_tokenizer(folder, vocab_size=128, eos_token_id=0, alphabet=string.printable + "¥")
    return AutoTokenizer.from_pretrained(folder)


def answer(plan):
    return f"I have what I need.\n<plan>\n{plan}</plan>"


def test_a_plan_that_keeps_everything_is_worth_1_and_right(reference):
    judged = grade(answer(PLAN), reference)
    assert (judged.score, judged.right, judged.reward, judged.value, judged.gave_up) == (1.0, True, 1.0, None, False)
    assert set(judged.parts) > set(DIMENSIONS) and judged.parts["unread lines"] == 0
    assert all(value == 1.0 for name, value in judged.parts.items() if name != "unread lines")


def test_each_half_by_hand(reference):
    """G3 for G1: one dimension of eight is lost, and one constraint of five."""
    judged = grade(answer(PLAN.replace("train G1", "train G3") + "26:00 sleep\n"), reference)
    assert judged.parts["commonsense"] == 7 / 8 and judged.parts["hard constraints, share"] == 4 / 5
    assert judged.score == pytest.approx((7 / 8 + 4 / 5) / 2)
    assert judged.parts["hard constraints, all"] == 0 and judged.parts["composite"] == 7 / 16
    assert judged.parts["sandbox compliance"] == 0 and judged.parts["route consistency"] == 1
    assert judged.parts["unread lines"] == 1 and not judged.right


@pytest.mark.parametrize("response", ["no plan", "<plan>nothing that is a day</plan>", answer(PLAN)[:-1], ""])
def test_without_a_plan_every_part_is_0(response, reference):
    judged = grade(response, reference)
    assert (judged.score, judged.right) == (0.0, False)
    assert set(judged.parts.values()) == {0.0}


@pytest.mark.parametrize(
    "response",
    [
        "<plan>" * 20_000,
        answer("Day 1:\nCurrent City: " + "from a " * 20_000),
        answer("Day 1:\n" + "08:00-09:00 | travel_city | " + "A - " * 20_000 + "\n"),
        answer("Day 1:\n" + "08:00-09:00 | meal | Lunch, A, ¥1\n" * 3000),
        answer("Day 1:\n" + "08:00-09:00 | travel_city | A - B" + ", 1km1km" * 120 + "x\n"),
        answer("Day 1:\n" * 3000),
    ],
)
def test_an_answer_that_repeats_itself_holds_nothing_up(response, reference):
    began = time.process_time()
    grade(response, reference)
    assert time.process_time() - began < 2


def test_a_task_without_constraints_has_no_second_half(prepared):
    """As in public: its best score is a half."""
    reference = prepared[0]["reward_model"]["ground_truth"].replace('"hard_constraints"', '"none"')
    assert grade(answer(PLAN), reference).score == 0.5


def test_the_graders_entry_judges_a_batch_by_name_and_by_data_source(prepared, reference, tokenizer):
    check_grader("deepplanning")
    responses = [f"<think>{answer('x')}</think>{answer(PLAN)}", "<think>unfinished", "no plan", "#### 5"]
    judged = judge_all(["deepplanning"] * 3 + ["final_hash"], responses, [reference] * 3 + ["5"])
    assert [judgement.reward for judgement in judged] == [1.0, 0.0, 0.0, 1.0]
    rows = [Row(where="f, line 1", fields=prepared[0])]
    for grader in ("auto", "deepplanning"):
        data = PromptConfig(grader=grader, chat_template="false", max_prompt_tokens=10_000)
        assert student_prompts("f", rows, data, tokenizer, 10_000).prompts[0].answer == reference


@pytest.mark.parametrize("truth", ["42", '{"database": 5}', '{"database": "x", "meta_info": {"org": "A"}}'])
def test_another_reference_answer_is_refused_when_the_prompts_are_read(truth, tokenizer):
    rows = [Row(where="f, line 1", fields={"prompt": "Hi", "answer": truth})]
    with pytest.raises(DataError, match="^f, line 1: data.grader=deepplanning: "):
        student_prompts("f", rows, PromptConfig(grader="deepplanning"), tokenizer, 10)


def test_a_database_that_is_not_there_any_more_is_one_line(reference, tmp_path):
    with pytest.raises(DataError, match="there is no such folder: the task's database was there when"):
        grade(answer(PLAN), reference.replace("database_en", "gone"))
