"""A token's own temperature on bucket log-probabilities."""

import math

import pytest
import torch

from opsd.ops.temperature import temper


def test_each_row_is_raised_to_its_own_power_and_sums_to_one():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]], dtype=torch.float64)
    tempered = temper(probs.log(), torch.tensor([2.0, 0.5], dtype=torch.float64)).exp()
    powers = torch.stack([probs[0].sqrt(), probs[1].square()])
    torch.testing.assert_close(tempered, powers / powers.sum(1, keepdim=True))


def test_temperature_one_changes_nothing_and_an_empty_bucket_stays_empty():
    logprobs = torch.tensor([[0.6, 0.0, 0.4], [0.1, 0.9, 0.0]]).log()
    torch.testing.assert_close(temper(logprobs, torch.ones(2)), logprobs)
    warmer = temper(logprobs, torch.full((2,), 3.0))
    assert warmer[0, 1] == -math.inf and warmer[1, 2] == -math.inf
    assert warmer[0, 0].exp() < 0.6


def test_temperatures_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"temperature_N must have shape \(2,\), got \(1,\)"):
        temper(torch.zeros(2, 3), torch.ones(1))
