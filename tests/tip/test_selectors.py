"""What each selector keeps, checked against counts and probabilities worked out by hand."""

import math
from fractions import Fraction

import pytest
import torch

from tip.selectors import SELECTORS, num_kept

LENGTHS = (1, 2, 7, 10, 33)


def make_score():
    return torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(0))


def kept_per_rollout(selection, lengths):
    kept = torch.zeros(sum(lengths), dtype=torch.int64)
    kept[selection.index_N] = 1
    return [int(part.sum()) for part in kept.split(list(lengths))]


@pytest.mark.parametrize("tenths", range(1, 11))
def test_count_is_the_exact_floor_of_the_decimal(tenths):
    ratio = float(f"{tenths / 10:.1f}")
    for length in range(1, 201):
        assert num_kept(length, ratio) == max(1, math.floor(Fraction(tenths, 10) * length)), (ratio, length)


def test_count_of_small_and_awkward_ratios():
    assert num_kept(10, 0.3) == 3 and num_kept(100, 0.29) == 29 and num_kept(1000, 0.001) == 1
    assert num_kept(5, 1e-9) == 1 and num_kept(0, 0.5) == 0 and num_kept(7, 1) == 7


@pytest.mark.parametrize("name", ["top_ratio", "sampled", "prefix"])
@pytest.mark.parametrize("ratio", [0.01, 0.3, 0.5, 0.9])
def test_counts_by_rollout_and_by_batch(name, ratio):
    generator = torch.Generator().manual_seed(0)
    by_rollout = SELECTORS[name](make_score(), LENGTHS, ratio=ratio, scope="rollout", generator=generator)
    assert kept_per_rollout(by_rollout, LENGTHS) == [num_kept(length, ratio) for length in LENGTHS]
    by_batch = SELECTORS[name](make_score(), LENGTHS, ratio=ratio, scope="batch", generator=generator)
    assert len(by_batch) == num_kept(sum(LENGTHS), ratio)
    for selection in (by_rollout, by_batch):
        assert torch.equal(selection.index_N, selection.index_N.unique())  # ascending and distinct
        assert torch.equal(selection.weight_N, torch.ones(len(selection)))


def test_top_ratio_keeps_the_highest_of_each_rollout_or_of_the_batch():
    score = torch.tensor([0.1, 0.9, 0.5, 0.2, 5.0, 7.0, 6.0, 8.0])
    by_rollout = SELECTORS["top_ratio"](score, (4, 4), ratio=0.5, scope="rollout")
    assert by_rollout.index_N.tolist() == [1, 2, 5, 7]
    by_batch = SELECTORS["top_ratio"](score, (4, 4), ratio=0.5, scope="batch")
    assert by_batch.index_N.tolist() == [4, 5, 6, 7]


def test_prefix_keeps_the_first_tokens_whatever_their_scores():
    score, lengths = -torch.arange(12.0), (8, 4)
    by_rollout = SELECTORS["prefix"](score, lengths, ratio=0.5, scope="rollout")
    assert by_rollout.index_N.tolist() == [0, 1, 2, 3, 8, 9]
    by_batch = SELECTORS["prefix"](score, lengths, ratio=0.5, scope="batch")
    assert by_batch.index_N.tolist() == [0, 1, 2, 8, 9, 10]
    assert torch.equal(by_batch.weight_N, torch.ones(6))


def test_every_rollout_keeps_a_token_however_low_its_scores():
    selection = SELECTORS["top_ratio"](torch.tensor([-9.0, 5.0, 6.0, 7.0]), (1, 3), ratio=0.01)
    assert selection.index_N.tolist() == [0, 3]


def test_of_equal_scores_the_earlier_token_stays():
    score = torch.zeros(2000)
    score[1500] = 1.0
    selection = SELECTORS["top_ratio"](score, (2000,), ratio=0.01)
    assert selection.index_N.tolist() == [*range(19), 1500]


@pytest.mark.parametrize("name", ["all", "top_ratio", "sampled", "prefix"])
@pytest.mark.parametrize("scope", ["rollout", "batch"])
def test_ratio_one_keeps_everything_with_weight_one(name, scope):
    selection = SELECTORS[name](make_score(), LENGTHS, ratio=1.0, scope=scope)
    assert torch.equal(selection.index_N, torch.arange(sum(LENGTHS))) and selection.index_N.dtype == torch.int64
    assert torch.equal(selection.weight_N, torch.ones(sum(LENGTHS))) and selection.weight_N.dtype == torch.float32


def test_sampled_frequency_follows_the_score():
    """20,000 rollouts of 4 tokens, 2 kept of each, against the law of two draws without replacement."""
    num_rollouts, share = 20_000, [0.1, 0.2, 0.3, 0.4]
    selection = SELECTORS["sampled"](
        torch.tensor(share).repeat(num_rollouts) * 7,
        (4,) * num_rollouts,
        ratio=0.5,
        generator=torch.Generator().manual_seed(0),
    )
    frequency = torch.bincount(selection.index_N % 4, minlength=4) / num_rollouts
    for i in range(4):
        expected = share[i] + sum(share[j] * share[i] / (1 - share[j]) for j in range(4) if j != i)
        sigma = (expected * (1 - expected) / num_rollouts) ** 0.5
        assert abs(float(frequency[i]) - expected) < 4 * sigma, (i, float(frequency[i]), expected)


def test_sampled_takes_zero_scores_last_and_evenly():
    num_rollouts = 6000
    selection = SELECTORS["sampled"](
        torch.tensor([0.0, 1e-30, 0.0, 0.0]).repeat(num_rollouts),
        (4,) * num_rollouts,
        ratio=0.5,
        generator=torch.Generator().manual_seed(0),
    )
    counts = torch.bincount(selection.index_N % 4, minlength=4)
    assert counts[1] == num_rollouts
    for i in (0, 2, 3):
        assert abs(int(counts[i]) - num_rollouts / 3) < 4 * (num_rollouts * 2 / 9) ** 0.5


def test_negative_scores_are_raised_together():
    """[-1, 0, 1] becomes [0, 1, 2]: the order of the tokens survives, none has a negative weight."""
    score = torch.tensor([-1.0, 0.0, 1.0])
    assert SELECTORS["soft"](score, (3,)).weight_N.tolist() == [0.0, 1.0, 2.0]
    picks = SELECTORS["sampled"](
        score.repeat(3000), (3,) * 3000, ratio=0.34, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.bincount(picks.index_N % 3, minlength=3)
    assert counts[0] == 0 and abs(int(counts[2]) - 2000) < 4 * (3000 * 2 / 9) ** 0.5


def test_sampled_follows_its_generator():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return SELECTORS["sampled"](make_score(), LENGTHS, ratio=0.3, scope="batch", generator=generator).index_N

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_soft_weights_are_proportional_with_mean_one():
    score = make_score()
    selection = SELECTORS["soft"](score, LENGTHS, ratio=0.1)
    assert torch.equal(selection.index_N, torch.arange(sum(LENGTHS)))
    assert float(selection.weight_N.double().mean()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(selection.weight_N / selection.weight_N[0], score / score[0])


def test_soft_falls_back_to_equal_weights():
    assert SELECTORS["soft"](torch.zeros(3), (3,)).weight_N.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_lengths_may_be_a_tensor_and_the_batch_empty(name):
    for lengths in (torch.tensor(LENGTHS), list(LENGTHS)):
        assert len(SELECTORS[name](make_score(), lengths)) == sum(LENGTHS)
    for scope in ("rollout", "batch"):
        assert len(SELECTORS[name](torch.zeros(0), (), scope=scope)) == 0


@pytest.mark.parametrize("name", sorted(SELECTORS))
@pytest.mark.parametrize("lengths", [(4, 5), (4, 7), (-1, 11), ()])
@pytest.mark.parametrize("scope", ["rollout", "batch"])
def test_lengths_that_do_not_sum_to_the_tokens_are_refused(name, lengths, scope):
    with pytest.raises(ValueError, match="lengths must be >= 0 and sum to T"):
        SELECTORS[name](torch.zeros(10), lengths, scope=scope)


@pytest.mark.parametrize("name", ["top_ratio", "sampled", "soft"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(name, bad):
    with pytest.raises(ValueError, match="scores must be finite, got 1 of 3"):
        SELECTORS[name](torch.tensor([0.1, bad, 0.2]), (3,))


@pytest.mark.parametrize("name", ["top_ratio", "sampled"])
def test_unknown_scope_and_ratio_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match="scope must be one of rollout, batch, got 'token'"):
        SELECTORS[name](make_score(), LENGTHS, scope="token")
    for ratio in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
            SELECTORS[name](make_score(), LENGTHS, ratio=ratio)
