"""Rollout and teacher engines on real Ray actors: what comes back does not depend on who was ready first."""

import os
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import ray

from opsd.cluster.ray import patience, ray_cluster
from opsd.config.engine import EngineSpec, RolloutConfig, TeacherConfig, teacher_spec
from opsd.engines.groups import in_order, num_read
from opsd.errors import WorkerLost
from opsd.rollout import RolloutPool
from opsd.teacher.pool import TeacherPool
from opsd.types import NoScores, Prompt, Vocabulary
from tests.opsd.builders import answered
from tests.tiny_models import make_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
VOCABULARY = Vocabulary(size=60, stop_ids=(0,))  # the models have 64 ids
NUM_PROMPTS = 7


@pytest.fixture(scope="module")
def pools(joined, tmp_path_factory):
    """(rollout pool of two engines that finish two rollouts at a time, teacher pool of two engines)."""
    path = str(make_tiny_qwen3(tmp_path_factory.mktemp("model"), tied=True, seed=0, eos_token_id=0, scale=2.0))
    shared = {"vocabulary": VOCABULARY, "device": "cpu", "max_model_tokens": 32}
    rollout = RolloutConfig(
        backend="transformers", num_workers=2, max_num_seqs=2, max_response_tokens=8, num_candidates=4
    )
    teacher = TeacherConfig(path=path, backend="transformers", num_workers=2, top_k=4)
    with ray_cluster(dashboard=False):
        rollout_pool = RolloutPool(EngineSpec(path=path, config=rollout, **shared), seed=0)
        teacher_pool = TeacherPool(teacher_spec(teacher, **shared))
        rollout_pool.wait_ready()
        teacher_pool.wait_ready()
        yield rollout_pool, teacher_pool


@pytest.fixture(scope="module")
def groups(pools):
    prompts = [
        Prompt(index=i, token_ids=np.arange(1, 3 + i, dtype=np.int32), text="", answer=None, source="")
        for i in reversed(range(NUM_PROMPTS))
    ]
    return list(pools[0].sample(prompts, samples_per_prompt=2, step=0))


def test_every_request_is_answered_once_at_its_place(groups):
    places = [place for group in groups for place in group]
    assert sorted(places) == list(range(2 * NUM_PROMPTS))
    assert sum(len(group) == 2 for group in groups) >= len(groups) - 2  # but the last of each engine
    assert max(map(len, groups)) == 2
    requested = [(index, sample) for index in reversed(range(NUM_PROMPTS)) for sample in range(2)]
    assert [(r.prompt.index, r.sample) for r in in_order(groups)] == requested


def test_the_same_prompt_twice_in_a_batch_gives_two_answers(pools):
    prompts = [Prompt(index=0, token_ids=np.arange(1, 4, dtype=np.int32), text="", answer=None, source="")] * 2
    first, second = in_order(pools[0].sample(prompts, samples_per_prompt=1, step=0))
    assert first.response_ids.tolist() != second.response_ids.tolist()


def test_scores_come_back_by_place_in_whatever_order_the_groups_came(pools, groups):
    """The teacher is the student, so its scores show which rollout they belong to."""
    for order in (groups, groups[::-1]):
        pending = pools[1].begin(order)
        pairs = answered(pending)
        assert all(group.is_scored() for group in pending)
        for rollout, expected in zip((r for r, _ in pairs), in_order(groups), strict=True):
            assert rollout is expected
        for rollout, scores in pairs:
            np.testing.assert_allclose(scores.sampled_logprobs, rollout.sampled_logprobs, atol=1e-4)


def test_answers_that_come_one_by_one_are_scored_by_both_engines(pools, groups):
    pending = pools[1].begin([{place: rollout} for group in groups for place, rollout in group.items()])
    tokens = Counter[int]()
    for part in (part for group in pending for part in group.parts):
        tokens[part.engine] += sum(map(num_read, part.rollouts))
    assert max(tokens.values()) - min(tokens.values()) <= max(num_read(r) for group in groups for r in group.values())
    assert len(answered(pending)) == 2 * NUM_PROMPTS
    assert pools[1].engines._in_flight.tokens == [0, 0]


def test_a_rollout_with_a_foreign_token_is_left_unscored(pools, groups):
    [place, *_] = groups[0]
    foreign = replace(groups[0][place], response_ids=np.full_like(groups[0][place].response_ids, 61))
    pairs = answered(pools[1].begin([{**groups[0], place: foreign}, *groups[1:]]))
    assert [i for i, (_, scores) in enumerate(pairs) if isinstance(scores, NoScores)] == [place]
    assert pairs[place][0] is foreign


@pytest.fixture
def restarts(pools):
    """Lost engines may be started again, one of each pool."""
    for pool in pools:
        pool.engines.actors.restart_lost(pool.num_restarts + 1, None)
    yield
    for pool in pools:
        pool.engines.actors.restart_lost(0, None)


def signal_to(pool, number, signum):
    worker = pool.engines.workers[number]
    os.kill(ray.get(worker.__ray_call__.remote(lambda _: os.getpid())), signum)


def require_answers(pools, expected, *, exactly):
    """Raises AssertionError unless the pool makes these answers again; in another batch sums round otherwise."""
    prompts = [rollout.prompt for rollout in in_order(expected)[::2]]
    found = in_order(pools[0].sample(prompts, samples_per_prompt=2, step=0))
    for own, wanted in zip(found, in_order(expected), strict=True):
        assert own.response_ids.tolist() == wanted.response_ids.tolist()
        np.testing.assert_allclose(own.sampled_logprobs, wanted.sampled_logprobs, atol=0 if exactly else 1e-5)


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_an_engine_that_is_lost_is_started_again_and_its_answers_are_made(
    pools, groups, restarts, signum, capfd, monkeypatch
):
    signal_to(pools[0], 1, signum)
    if signum == signal.SIGSTOP:
        monkeypatch.setitem(patience, "answer_s", 30.0)
    require_answers(pools, groups, exactly=False)
    said = {signal.SIGKILL: "was lost", signal.SIGSTOP: "has not answered for 30 s (placement.answer_s)"}[signum]
    lines = [line for line in capfd.readouterr().err.splitlines() if "is started again" in line]
    assert len(lines) == 1 and "rollout 1 is started again (" in lines[0] and said in lines[0]


@pytest.mark.usefixtures("restarts")
def test_work_that_was_dealt_at_the_start_is_made_again_to_the_last_bit(pools, groups):
    prompts = [rollout.prompt for rollout in in_order(groups)[::2]][:2]
    expected = list(pools[0].sample(prompts, samples_per_prompt=2, step=0))  # two for each engine: no queue
    signal_to(pools[0], 0, signal.SIGKILL)
    require_answers(pools, expected, exactly=True)


def test_an_engine_that_is_lost_too_often_ends_the_work(pools, groups):
    signal_to(pools[0], 1, signal.SIGKILL)
    with pytest.raises(WorkerLost, match="^rollout: worker 1 was lost"):
        require_answers(pools, groups, exactly=False)
    pools[0].engines.actors.restart_lost(9, None)
    require_answers(pools, groups, exactly=False)


@pytest.mark.usefixtures("restarts")
def test_a_teacher_that_is_lost_after_it_has_scored_scores_again(pools, groups):
    expected = answered(pools[1].begin(groups))
    pending = pools[1].begin(groups)
    busy_s = [part.busy_s for group in pending for part in group.parts]
    ray.wait(busy_s, num_returns=len(busy_s))
    signal_to(pools[1], 0, signal.SIGKILL)
    later = pools[1].begin(groups[:1])  # given to the engine that is gone
    assert same_scores(answered(pending), expected)
    assert same_scores(answered(later), [pair for pair in expected if any(pair[0] is r for r in groups[0].values())])
    assert pools[1].num_restarts == 1


def same_scores(found, expected):
    return [(r.response_ids.tolist(), s.sampled_logprobs.tolist()) for r, s in found] == [
        (r.response_ids.tolist(), s.sampled_logprobs.tolist()) for r, s in expected
    ]
