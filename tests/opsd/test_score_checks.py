"""Scores that cannot be a teacher's log-probabilities of the tokens that it was asked about: named, not trained on."""

import re
from dataclasses import replace

import numpy as np
import pytest

from opsd.errors import StageError
from opsd.score_checks import check_scores, flat_scores
from opsd.types import ScoredRollout, Vocabulary
from tests.opsd.builders import make_scored, merge_stops, random_logprobs, scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0, 3))
RESPONSE = [7, 3, 11, 5, 0]


def scored(teacher_TV, *, top_k=8, score_candidates=True):
    student_TV = merge_stops(random_logprobs(len(RESPONSE), 20, seed=1), VOCABULARY)
    rollout, scores = make_scored(
        student_TV, merge_stops(teacher_TV, VOCABULARY), RESPONSE, num_candidates=6, top_k=top_k,
        vocabulary=VOCABULARY, score_candidates=score_candidates,
    )  # fmt: skip
    return ScoredRollout(rollout=rollout, scores=scores)


def with_scores(item, **changed):
    return replace(item, scores=replace(item.scores, **changed))


@pytest.mark.parametrize("score_candidates", [True, False])
@pytest.mark.parametrize("top_k", [1, 4, 18, 20])  # 20 is more than there are events: its last slot is empty
def test_right_scores_pass(top_k, score_candidates):
    items = [scored(random_logprobs(5, 20, seed), top_k=top_k, score_candidates=score_candidates) for seed in range(20)]
    check_scores("t", items, VOCABULARY)
    check_scores("t", [], VOCABULARY)
    check_scores("t", scored_rollouts([5, 2], VOCABULARY), VOCABULARY)


def test_the_sampled_token_has_its_own_log_probability_among_the_likeliest():
    first, second = scored(random_logprobs(5, 20, 4), top_k=18), scored(random_logprobs(5, 20, 5), top_k=18)
    moved = second.scores.sampled_logprobs.copy()
    moved[2] += 0.01
    said = (
        r"score: the teacher /t gives token 11 of place 2 of answer 0 to test, row 1, the log-probability -?[\d.]+ "
        r"where it was asked about it, -?[\d.]+ among its likeliest, .* \(1 of 10 tokens\)"
    )
    with pytest.raises(StageError, match=said):
        check_scores("/t", [first, with_scores(second, sampled_logprobs=moved)], VOCABULARY)
    moved[2] -= 0.0095
    check_scores("/t", [first, with_scores(second, sampled_logprobs=moved)], VOCABULARY)


def test_a_token_that_is_not_among_the_likeliest_is_less_likely_than_they():
    item = scored(random_logprobs(5, 20, 4), top_k=2)
    outside = (item.scores.top_ids != np.array([7, 0, 11, 5, 0])[:, None]).all(axis=1).nonzero()[0][0]
    moved = item.scores.sampled_logprobs.copy()
    moved[outside] = item.scores.top_logprobs[outside, -1] + 0.1
    with pytest.raises(StageError, match=r"and does not name it, of which the last has"):
        check_scores("t", [with_scores(item, sampled_logprobs=moved)], VOCABULARY)


def test_the_candidates_scores_are_those_of_the_candidates():
    item = scored(random_logprobs(5, 20, 4), top_k=18)
    with pytest.raises(StageError, match=r"scores of the tokens that it was asked about"):
        check_scores("t", [with_scores(item, candidate_logprobs=item.scores.candidate_logprobs[::-1])], VOCABULARY)


def test_a_mass_above_one_is_no_distribution():
    item = scored(random_logprobs(5, 20, 4))
    with pytest.raises(StageError, match=r"at place 0 of answer 0 to test, row 1, a mass of .*: these are no log-prob"):
        check_scores("t", [with_scores(item, top_logprobs=np.zeros_like(item.scores.top_logprobs))], VOCABULARY)


@pytest.mark.parametrize("top_k", [3, 18])
def test_a_teacher_that_says_the_same_of_every_token_is_named(top_k):
    """The stop event is two ids, so it has twice the probability of the others."""
    uniform = scored(random_logprobs(5, 20, 0, scale=0.0), top_k=top_k)
    assert np.exp(uniform.scores.top_logprobs[0, 0]) == pytest.approx(0.1)
    said = flat_scores("/t", [uniform, uniform], VOCABULARY)
    assert re.search(r"/t gives every token the same log-probability, -2.996; .*\(-log V = -2.996\)", said)
    assert not flat_scores("/t", [uniform, scored(random_logprobs(5, 20, 0, scale=0.01), top_k=top_k)], VOCABULARY)
