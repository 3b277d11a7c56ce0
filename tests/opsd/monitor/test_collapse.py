"""What a run warns of while it goes on: once per sign, with the number that gave it away."""

from dataclasses import replace

import numpy as np
import pytest

from opsd.monitor.collapse import StepWatch, repetition
from opsd.monitor.warned import Warned
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts

FINE = {"entropy": 0.03, "repetition": 0.1, "truncated": 0.2, "response_length": 100.0, "dropped/nan_score": 0}


def answers(*responses):
    [item] = scored_rollouts([1], Vocabulary(size=8, stop_ids=(0,)), top_k=2)
    return [
        replace(
            item.rollout,
            response_ids=np.array(ids, np.int32),
            sampled_logprobs=np.zeros(len(ids), np.float32),
            candidate_ids=np.zeros((len(ids), 1), np.int32),
            candidate_logprobs=np.zeros((len(ids), 1), np.float32),
        )
        for ids in responses
    ]


def plain_repetition(ids):
    grams = [tuple(ids[start : start + 4]) for start in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams)


def test_repetition_is_the_share_of_4_grams_that_stood_in_the_answer_before():
    assert repetition(answers([1, 2, 3, 4, 5, 6])) == 0.0
    assert repetition(answers([9] * 13)) == 0.9
    assert repetition(answers([9] * 13, [1, 2, 3, 4], [7, 7])) == 0.45  # an answer of two tokens has no say
    assert repetition(answers([1, 2, 3])) is None
    rng = np.random.default_rng(0)
    for top, length in ((2, 50), (3, 400), (150_000, 300)):
        ids = rng.integers(0, top, length).tolist()
        ids += ids[: length // 3]
        assert repetition(answers(ids)) == pytest.approx(plain_repetition(ids))


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("entropy", 0.0002, "the student's entropy is 0.0002 of log V, below 0.001"),
        ("repetition", 0.75, "75% of an answer's 4-grams stood in it before, above 50%"),
        ("truncated", 0.95, "95% of the answers were cut at rollout.max_response_tokens, above 90%"),
        ("response_length", 20.0, "the answers have 20.0 tokens on average, below 25% of the 100.0 in the first step"),
        ("dropped/nan_score", 3, "3 answers are left out, because of nan_score: dropped/nan_score counts them"),
    ],
)
def test_each_sign_is_said_once_and_counted(name, value, said, capsys):
    warned = Warned()
    watch = StepWatch(warned)
    watch.look_at(1, FINE)
    assert not capsys.readouterr().err
    for step in (2, 3):
        watch.look_at(step, {**FINE, name: value})
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: step 2: {said}")
    assert warned.counts == {name: 2}


def test_an_evaluation_s_left_out_answers_are_a_warning_of_their_own(capsys):
    watch = StepWatch(Warned())
    watch.look_at(0, {"eval/accuracy": None, "eval/dropped/nan_score": 2, "eval/dropped/foreign_token": 0})
    [line] = capsys.readouterr().err.splitlines()
    assert line == ("warning: step 0: 2 answers are left out, because of nan_score: eval/dropped/nan_score counts them")


def test_what_was_not_measured_is_no_sign():
    warned = Warned()
    StepWatch(warned).look_at(1, {**FINE, "repetition": None, "entropy": None})
    assert not warned.counts
