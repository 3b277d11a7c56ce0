"""Intervals of paired differences against formulas and against draws whose truth is known."""

import numpy as np
import pytest

from scripts.ablation.intervals import NUM_RESAMPLES, differences, weights


def test_each_resample_is_a_mean_over_seeds_and_their_problems():
    weight_BSP = weights(3, 7).reshape(NUM_RESAMPLES, 3, 7)
    np.testing.assert_allclose(weight_BSP.sum(axis=(1, 2)), 1.0)
    np.testing.assert_allclose(weight_BSP.sum(axis=2) * 3, (weight_BSP.sum(axis=2) * 3).round(), atol=1e-12)
    np.testing.assert_allclose(weight_BSP.mean(axis=0), 1 / 21, atol=0.004)


def test_an_interval_has_the_width_of_both_kinds_of_noise():
    """One seed: the standard error over its problems. Problems that are alike: that over the seeds."""
    generator = np.random.default_rng(1)
    over_problems = generator.normal(0.1, 1.0, (1, 1, 400))
    [found] = differences(over_problems)
    error = over_problems.std() / 20
    assert found.mean == pytest.approx(over_problems.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    seeds = np.array([-0.2, -0.1, 0.1, 0.3, 0.4])
    [found] = differences(np.broadcast_to(seeds[None, :, None], (1, 5, 50)))
    assert found.high - found.low == pytest.approx(2 * 1.96 * seeds.std() / 5**0.5, rel=0.1)


def test_what_stands_out_is_corrected_for_the_number_of_arms():
    """Arms of pure noise: about one in twenty leaves 0 out alone, and nearly none for all arms at once."""
    generator = np.random.default_rng(2)
    noise = generator.normal(0.0, 1.0, (40, 1, 300))
    alone = [not each.low <= 0 <= each.high for each in differences(noise)]
    assert 1 <= sum(alone) <= 6
    assert not any(each.stands_out for each in differences(noise))
    noise[7] += 0.5
    assert [place for place, each in enumerate(differences(noise)) if each.stands_out] == [7]


def test_equal_arms_differ_by_nothing():
    [found] = differences(np.zeros((1, 3, 10)))
    assert (found.mean, found.low, found.high, found.stands_out) == (0.0, 0.0, 0.0, False)
