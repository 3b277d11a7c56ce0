"""The ratio that follows the loss against a trace worked out step by step, and the temperature against its formula."""

import json
import math

import pytest
import torch

from tip.adaptive import LossDrivenRatio, inverse_difficulty_temperature

FALL = [4.0 * 0.95**i for i in range(25)]
PLATEAU = [FALL[-1]] * 15
RISE = [FALL[-1] * 1.06**i for i in range(1, 21)]
LOSSES = FALL + PLATEAU + RISE


def trace(ratio, losses):
    return [ratio.update(loss) for loss in losses]


def test_hand_computed_trace_without_memory():
    """beta 0: the mean is the loss. Two losses warm up; the reference is 100, 94, 89, 94, 100, 200, 300 by turns."""
    ratio = LossDrivenRatio(num_warmup=2, beta=0.0, ratio_step=0.1)
    losses = [300.0, 100.0, 96.0, 94.0, 90.0, 89.0, 94.0, 96.0, 100.0, 102.0, 200.0, 300.0]
    # 96 > 95: stays. 94 < 95: falls. 90 > 89.3: stays. 89 < 89.3: falls. 94 > 93.45: rises. 96 < 98.7: stays ...
    expected = [1, 1, 1, 0.9, 0.9, 0.81, 0.891, 0.891, 0.9801, 0.9801, 1, 1]
    assert trace(ratio, losses) == pytest.approx(expected, abs=1e-12)


def test_sixty_losses_that_fall_level_out_and_rise():
    """Once more as the formulas say it, on a list of all means."""
    means = [LOSSES[0]]
    for loss in LOSSES[1:]:
        means.append(0.7 * means[-1] + 0.3 * loss)
    expected, current, reference = [1.0] * 3, 1.0, means[2]
    for mean in means[3:]:
        relative = mean / reference - 1
        if abs(relative) > 0.05:
            current = min(1.0, max(0.3, current * (0.9 if relative < 0 else 1.1)))
            reference = mean
        expected.append(current)
    found = trace(LossDrivenRatio(num_warmup=3, beta=0.7, ratio_step=0.1, floor=0.3), LOSSES)
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(found) == 60 and found[:3] == [1, 1, 1] and found[24] < 0.4
    assert len(set(found[32:40])) == 1 and found[59] > 1.5 * found[39]


def test_default_memory_of_a_hundred_steps_moves_slowly():
    ratio = LossDrivenRatio()
    assert trace(ratio, [1.0] + [0.5] * 10) == [1.0] * 11  # the mean is 0.5 + 0.5 * 0.99^10 = 0.952
    assert ratio.update(0.5) == 0.95  # 0.5 + 0.5 * 0.99^11 = 0.948


def test_bounds_hold_and_the_reference_moves_on_there():
    ratio = LossDrivenRatio(beta=0.0, ratio_step=0.5, floor=0.2)
    assert trace(ratio, [8.0, 4.0, 2.0, 1.0, 0.5]) == [1.0, 0.5, 0.25, 0.2, 0.2]
    assert ratio.update(0.6) == pytest.approx(0.3)  # against the 0.5 before it, not the 1.0 that reached the floor
    assert trace(ratio, [6.0, 60.0, 600.0, 6000.0]) == pytest.approx([0.45, 0.675, 1.0, 1.0])
    assert ratio.update(600.0) == 0.5


def test_a_loss_below_zero_is_measured_against_its_size():
    """Bounds of -100 are -105 and -95: what falls below shrinks, what rises above grows, what lies between stays."""
    ratio = LossDrivenRatio(initial=0.8, beta=0.0, ratio_step=0.1)
    assert trace(ratio, [-100.0, -104.0, -96.0]) == [0.8] * 3
    assert ratio.update(-106.0) == pytest.approx(0.72)  # the new reference: bounds -111.3 and -100.7
    assert ratio.update(-101.0) == pytest.approx(0.72)
    assert ratio.update(-100.0) == pytest.approx(0.792)
    across = LossDrivenRatio(initial=0.8, beta=0.0, ratio_step=0.1)
    assert trace(across, [1.0, -1.0, 1.0]) == pytest.approx([0.8, 0.72, 0.792])


def test_the_ratio_waits_at_initial_through_the_warm_up():
    ratio = LossDrivenRatio(initial=0.6, num_warmup=3, beta=0.0)
    assert ratio.ratio == 0.6
    assert trace(ratio, [9.0, 3.0, 1.0, 1.0]) == [0.6] * 4
    assert ratio.update(0.9) == pytest.approx(0.57) == ratio.ratio


@pytest.mark.parametrize("num_before", [0, 2, 3, 30, 47])
def test_a_resumed_trace_goes_on_exactly(num_before):
    settings = {"num_warmup": 3, "beta": 0.7, "ratio_step": 0.1}
    whole = trace(LossDrivenRatio(**settings), LOSSES)
    first, second = LossDrivenRatio(**settings), LossDrivenRatio(**settings)
    before = trace(first, LOSSES[:num_before])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.ratio == first.ratio
    assert before + trace(second, LOSSES[num_before:]) == whole


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_refused_and_forgotten(loss):
    ratio = LossDrivenRatio(beta=0.0)
    ratio.update(1.0)
    with pytest.raises(ValueError, match="loss must be finite"):
        ratio.update(loss)
    assert ratio.update(0.5) == 0.95


@pytest.mark.parametrize(
    "settings",
    [{"floor": 0.0}, {"initial": 0.05}, {"initial": 1.5}, {"beta": 1.0}, {"loss_tolerance": -0.1}, {"num_warmup": -1}],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LossDrivenRatio(**settings)


@pytest.mark.parametrize("options", [{}, {"base": 2.0, "strength": 1.0}, {"strength": 0.0}])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 100])
def test_temperature_is_its_formula(options, num_tokens):
    generator = torch.Generator().manual_seed(0)
    difficulty = torch.rand(num_tokens, generator=generator, dtype=torch.float64)
    median = difficulty.sort().values[(num_tokens - 1) // 2]
    base, strength = options.get("base", 1.0), options.get("strength", 0.5)
    expected = base * torch.exp(-strength * torch.tanh(torch.log(difficulty / median)))
    torch.testing.assert_close(inverse_difficulty_temperature(difficulty, **options), expected)


def test_temperature_of_perfect_tokens():
    hot, cold = math.exp(0.5), math.exp(-0.5)
    found = inverse_difficulty_temperature(torch.tensor([0.0, 0.2, 0.2, 0.9, 1e-30]))
    assert found.tolist() == pytest.approx([hot, 1.0, 1.0, math.exp(-0.5 * math.tanh(math.log(4.5))), hot])
    mostly_perfect = inverse_difficulty_temperature(torch.tensor([0.0, 0.0, 0.0, 0.7, 1e-30]))
    assert mostly_perfect.tolist() == pytest.approx([1.0, 1.0, 1.0, cold, cold])
    assert inverse_difficulty_temperature(torch.full((3,), 1e-30)).tolist() == [1.0] * 3
    assert inverse_difficulty_temperature(torch.zeros(0)).shape == (0,)


def test_temperature_is_a_constant_in_the_gradient():
    difficulty = torch.rand(4, requires_grad=True)
    assert not inverse_difficulty_temperature(difficulty).requires_grad


@pytest.mark.parametrize("difficulty", [[0.1, -0.1], [0.1, math.nan]])
def test_difficulties_out_of_range_are_refused(difficulty):
    with pytest.raises(ValueError, match="difficulties must be >= 0"):
        inverse_difficulty_temperature(torch.tensor(difficulty))
    with pytest.raises(ValueError, match="base must be > 0, got 0.0"):
        inverse_difficulty_temperature(torch.ones(2), base=0.0)
    with pytest.raises(ValueError, match="strength must be at least 0, got -0.5"):
        inverse_difficulty_temperature(torch.ones(2), strength=-0.5)
