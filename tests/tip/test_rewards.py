"""Advantages and weights of rollouts, group by group."""

import math

import pytest
import torch

from tip.rewards import group_advantage, paced_weight, reward_weight

GROUPS = torch.tensor([7, 2, 7, 2, 7, 7, 5])  # neither sorted nor from 0; the group 5 is a single rollout


def test_advantage_is_standardised_within_its_group():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 1.0])
    # Group 7: 1, 0, 0, 1, mean 1/2, deviation 1/2. Group 2: 0, 1/2, mean 1/4, deviation 1/4.
    assert group_advantage(rewards, GROUPS).tolist() == pytest.approx([1, -1, -1, 1, -1, 1, 0])


def test_equal_rewards_have_no_advantage_however_their_mean_rounds():
    for reward in (0.0, 0.1, 0.7, 1.0):
        for size in range(1, 20):
            rewards = torch.full((size,), reward)
            assert (group_advantage(rewards, torch.zeros(size, dtype=torch.int64)) == 0).all()


def test_reward_weight_is_a_softmax_of_mean_one():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.5, 0.0, 1.0, 1.0])
    weight = reward_weight(rewards, GROUPS, beta=0.5)
    for own in (GROUPS.eq(2), GROUPS.eq(5), GROUPS.eq(7)):
        expected = (rewards[own] / 0.5).softmax(0) * own.sum()
        torch.testing.assert_close(weight[own], expected)


def test_reward_weight_has_no_overflow():
    weight = reward_weight(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 0, 0]), beta=1e-4)
    assert weight.tolist() == [0.0, 1.5, 1.5]


def test_paced_weight_peaks_where_the_student_is_at_its_edge():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])  # pass rates: group 7 1/2, group 2 1, group 5 0
    assert paced_weight(rewards, GROUPS).tolist() == [1, 0, 1, 0, 1, 1, 0]
    quarter = torch.tensor([1.0, 0.0, 0.0, 0.0])
    group = torch.zeros(4, dtype=torch.int64)
    assert paced_weight(quarter, group).tolist() == pytest.approx([0.75] * 4)
    assert paced_weight(quarter, group, a=1.0, b=3.0).tolist() == pytest.approx([1.0] * 4)
    assert paced_weight(quarter, group, a=2.0, b=1.0)[0] == pytest.approx((1 / 16 * 3 / 4) / (4 / 9 * 1 / 3))


@pytest.mark.parametrize("rewards", [[0.0] * 7, [1.0] * 7, [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]])
def test_a_step_of_prompts_without_an_edge_has_no_weight(rewards):
    assert paced_weight(torch.tensor(rewards), GROUPS).tolist() == [0.0] * 7


def test_the_advantage_divides_by_the_populations_deviation_or_by_torch_std():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5]), torch.tensor([7, 7, 7, 7, 2, 2, 9])
    own = rewards[:4]
    population, sample = own - own.mean(), (own - own.mean()) / own.std()
    nothing = torch.zeros(3)
    torch.testing.assert_close(
        group_advantage(rewards, groups), torch.cat([population / own.std(correction=0), nothing])
    )
    torch.testing.assert_close(group_advantage(rewards, groups, unbiased=True), torch.cat([sample, nothing]))


@pytest.mark.parametrize("function", [group_advantage, lambda r, g: reward_weight(r, g, beta=1.0), paced_weight])
def test_shapes_and_dtypes(function):
    assert function(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert function(torch.tensor([True, False]), torch.tensor([3, 3])).dtype == torch.float32
    assert function(torch.ones(2, dtype=torch.float64), torch.tensor([3, 3])).dtype == torch.float64
    with pytest.raises(ValueError, match=r"must both be \[R\], got \(2,\) and \(3,\)"):
        function(torch.zeros(2), torch.zeros(3, dtype=torch.int64))


def test_options_out_of_range_are_refused():
    rewards, groups = torch.tensor([0.0, 1.0]), torch.tensor([0, 0])
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="beta must be > 0"):
            reward_weight(rewards, groups, beta=beta)
    with pytest.raises(ValueError, match="a and b must be > 0, got 1.0 and 0.0"):
        paced_weight(rewards, groups, b=0.0)
    for reward in (-0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"rewards must be in \[0, 1\]"):
            paced_weight(torch.tensor([reward, 1.0]), groups)
