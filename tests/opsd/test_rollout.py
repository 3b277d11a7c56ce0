"""How answers are seeded."""

import numpy as np
import pytest

from opsd.config.engine import RolloutConfig
from opsd.engines.pool import request_seed
from opsd.errors import StageError
from opsd.rollout import RolloutPool
from opsd.types import Prompt


class Requests:
    """Engines that tell what they were asked for."""

    def generate(self, requests, sampling, policy_version, group_size, *, apart, wrap):
        return [(prompt.index, sample, seed) for prompt, sample, seed in requests]


@pytest.fixture
def pool():
    pool = RolloutPool.__new__(RolloutPool)  # without actors
    pool.cfg, pool.seed, pool.policy_version, pool.engines = RolloutConfig(), 7, 3, Requests()
    pool.max_staleness, pool.wrap = 0, None
    return pool


def make_prompts(*indices):
    return [Prompt(index=i, token_ids=np.array([2], np.int32), text="", answer=None, source="file") for i in indices]


def test_a_prompt_that_is_in_a_batch_several_times_is_answered_differently(pool):
    asked = pool.sample(make_prompts(0, 1, 0, 2, 0), samples_per_prompt=2, step=3)
    assert [(index, sample) for index, sample, _ in asked] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (2, 0), (2, 1), (0, 4), (0, 5),
    ]  # fmt: skip
    assert len({seed for _, _, seed in asked}) == len(asked)


def test_a_seed_depends_on_run_step_prompt_and_sample_alone_where_no_prompt_repeats(pool):
    asked = pool.sample(make_prompts(5, 3), samples_per_prompt=2, step=3)
    assert asked == [(i, sample, request_seed(7, 4, i, sample)) for i in (5, 3) for sample in range(2)]
    assert request_seed(7, 4, 5, 1) == 202_949_319  # as ever: a run of an earlier version continues with the same


def test_a_resumed_batch_is_sampled_as_before_and_another_step_is_not(pool):
    prompts = make_prompts(1, 1, 2)
    before = pool.sample(prompts, samples_per_prompt=1, step=3)
    assert pool.sample(prompts, samples_per_prompt=1, step=3) == before
    pool.policy_version = 4
    later = pool.sample(prompts, samples_per_prompt=1, step=4)
    assert not {seed for _, _, seed in before} & {seed for _, _, seed in later}


def test_a_step_is_not_answered_by_another_step_s_weights(pool):
    with pytest.raises(
        StageError, match="step 6 trains the weights of policy version 5, and the engines hold version 3"
    ):
        pool.sample(make_prompts(0), samples_per_prompt=1, step=5)
    assert len(pool.sample(make_prompts(0), samples_per_prompt=1, step=-1)) == 1  # an evaluation takes what is there


@pytest.mark.parametrize("step", [3, 4, 5])
def test_answers_may_be_as_old_as_the_run_says_and_no_older(pool, step):
    pool.max_staleness = 1
    if step <= 4:
        assert pool.sample(make_prompts(0), samples_per_prompt=1, step=step)
    else:
        with pytest.raises(StageError, match="trains the weights of policy version 5, and the engines hold version 3"):
            pool.sample(make_prompts(0), samples_per_prompt=1, step=step)
    with pytest.raises(StageError, match="trains the weights of policy version 2"):  # of weights that are to come
        pool.sample(make_prompts(0), samples_per_prompt=1, step=2)
