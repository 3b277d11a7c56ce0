"""Judgements come to the answers that they are of, whenever they were made, and leave with them."""

import gc
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest

from opsd.data import grading, grading_ahead
from opsd.data.grading_ahead import GradingAhead
from opsd.types import Prompt, Rollout


class Digits:
    """A tokenizer whose tokens are digits, after a hash."""

    added_tokens_decoder: dict = {}

    def convert_tokens_to_ids(self, _):
        return None

    def decode(self, ids, **_):
        return "#" + "".join(map(str, ids))


def answered(token, answer="7"):
    prompt = Prompt(index=0, token_ids=np.array([1], np.int32), text="?", answer=answer, source="test")
    nothing = np.zeros((1, 1), np.float32)
    return Rollout(
        prompt=prompt,
        sample=0,
        response_ids=np.array([token], np.int32),
        sampled_logprobs=nothing[0],
        candidate_ids=nothing.astype(np.int32),
        candidate_logprobs=nothing,
        stopped=True,
        policy_version=0,
    )


@pytest.fixture
def ahead():
    ahead = GradingAhead("final_hash", Digits())
    yield ahead
    ahead.close()


def test_every_answer_gets_its_own_judgement_whatever_became_of_the_others(ahead):
    groups = [{5: answered(7), 0: answered(3)}, {2: answered(7, answer="8"), 1: answered(9, answer="9")}]
    passed = list(ahead.passing(groups))
    assert passed == groups
    kept = [passed[1][1], passed[0][0], passed[0][5]]  # one of them was dropped
    assert [judged.right for judged in ahead.judgements(kept)] == [True, False, True]
    assert [judged.value for judged in ahead.judgements(kept)] == ["9", "3", "7"]


def test_grading_begins_before_anyone_asks_and_an_error_waits_for_who_does(ahead, monkeypatch):
    graded = threading.Event()

    def fails(*_):
        graded.set()
        raise RuntimeError("no grader today")

    monkeypatch.setattr(grading_ahead, "judge_rollouts", fails)
    [group] = ahead.passing([{0: answered(7)}])
    assert graded.wait(60)
    with pytest.raises(RuntimeError, match="no grader today"):
        ahead.judgements([group[0]])


def test_nothing_is_kept_of_answers_that_are_gone(ahead):
    [group] = ahead.passing([{0: answered(7), 1: answered(3)}])
    ahead.judgements(list(group.values()))
    assert len(ahead._begun) == 2
    del group
    ahead._executor.submit(gc.collect).result()  # whose thread may hold its last task
    assert ahead._begun == {}


def test_a_users_grader_is_called_where_it_may_set_an_alarm(monkeypatch):
    def with_an_alarm(response, answer):
        # A ValueError in any thread but the main one.
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        return True

    monkeypatch.setattr(grading, "grader_named", lambda name: with_an_alarm)
    ahead = GradingAhead("mine:with_an_alarm", Digits())
    [group] = ahead.passing([{0: answered(7)}])
    assert [judged.right for judged in ahead.judgements([group[0]])] == [True]


def test_an_answer_that_did_not_pass_is_graded_all_the_same(ahead):
    [group] = ahead.passing([{0: answered(7)}])
    other = replace(group[0], sample=1)
    assert [judged.right for judged in ahead.judgements([group[0], other])] == [True, True]
