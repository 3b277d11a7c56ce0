"""The tasks of the ablation beside sums: their worked answers are true, fit, and can be told from wrong ones."""

import re
import sys
from itertools import islice

import pytest

from opsd.data.grading import final_hash
from pairs import sorting
from pairs.plans import PLANS
from pairs.sorting import solved
from pairs.stories import WORD
from pairs.task import EOS_ID, MAX_TOKENS, distinct, is_held_out, is_right, one_side


@pytest.mark.parametrize("name", PLANS)
def test_a_text_is_written_with_the_vocabulary_and_fits(name):
    plan = PLANS[name]
    tokenizer = plan.tokenizer()
    for problem in islice(plan.draw("texts"), 300):
        ids = [tokenizer.encode(text) for text in (problem.prompt, problem.response)]
        assert [tokenizer.decode(each) for each in ids] == [problem.prompt, problem.response]
        assert len(ids[1]) + 1 <= plan.max_response_tokens
        assert len(ids[0]) + plan.max_response_tokens <= MAX_TOKENS
    assert tokenizer.eos_token_id == EOS_ID and len(tokenizer) == len(set(plan.vocabulary)) == len(plan.vocabulary)


@pytest.mark.parametrize("name", PLANS)
def test_the_grader_of_a_run_agrees_with_that_of_the_pair(name):
    one, other = islice((p for p in PLANS[name].draw("grades")), 2)
    for response in (one.response, other.response, "#", ""):
        assert final_hash(response, one.answer).right is is_right(response, one)
    assert is_right(one.response, one) and not is_right(other.response, one)


@pytest.mark.parametrize("name", PLANS)
def test_a_seed_gives_one_stream_and_held_out_problems_are_apart(name):
    draw = PLANS[name].draw
    assert list(islice(draw("a"), 20)) == list(islice(draw("a"), 20)) != list(islice(draw("b"), 20))
    held_out = distinct(one_side(draw("a"), held_out=True), 30)
    assert len({p.prompt for p in held_out}) == 30 and all(map(is_held_out, held_out))
    assert not any(map(is_held_out, islice(one_side(draw("a"), held_out=False), 200)))


def test_sorting_is_by_insertion_in_the_direction_of_the_package():
    falling = solved({"original_numbers": ["13.0", "5.0", "28.0"], "direction": "descending"})
    assert falling.prompt == "Sort these numbers in descending order: 13, 5, 28"
    assert falling.response == "13;13 5#28 13 5" and falling.answer == "28 13 5"
    rising = solved({"original_numbers": ["7", "7", "0"], "direction": "ascending"})
    assert rising.response == "7;7 7#0 7 7"


def test_problems_of_the_package_are_sorted_as_it_says():
    module = sorting.task_module("algorithmic.number_sorting")
    data = module.NumberSortingDataset(module.NumberSortingConfig(max_decimals=0, min_value=0, max_value=30, seed=1))
    for entry in islice(data, 50):
        answer = solved(entry["metadata"]).answer.split()
        assert data.score_answer(str(answer), entry) == 1.0
    assert "reasoning_gym.games" not in sys.modules  # nor the dozen packages that all of it needs


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sorting, "PathFinder", type("Nothing", (), {"find_spec": staticmethod(lambda *_: None)}))
    with pytest.raises(ImportError, match=r"^reasoning-gym is missing: run scripts/setup.sh, or pip install --no-deps"):
        sorting.task_module("algorithmic.number_sorting")


def test_every_step_of_a_story_is_true_and_follows_from_the_last():
    numbers_of_steps = set()
    for problem in islice(PLANS["stories"].draw("steps"), 500):
        steps, _, final = problem.response.partition("#")
        held = int(re.search(r"has (\d)", problem.prompt)[1])
        product = None
        for left, right in (step.split("=") for step in steps.split(";")):
            assert eval(left) == int(right)
            if "*" in left:
                product = int(right)
                assert re.search(rf"{left[0]} bags of {left[2]}\.", problem.prompt)
                continue
            start, _, change = re.fullmatch(r"(\d+)([+-])(\d+)", left).groups()
            assert int(start) == held and (product is None or int(change) == product)
            held, product = int(right), None
        assert held == int(final) == int(problem.answer) > 0
        numbers_of_steps.add(steps.count("="))
    assert numbers_of_steps == {2, 3, 4}
    assert re.findall(WORD, "Ann has 4.") == ["Ann", " has", " ", "4", "."]
