"""Rewards and gates of the sampled event: values event by event, gradients against what they say of every event."""
# V events

import math

import pytest
import torch

from opsd.ops.losses.divergences import forward_kl, reverse_kl
from opsd.ops.losses.sampled import _clipped, power, sign_gate, sign_log, trust
from tests.opsd.ops.losses.test_policy import TEACHER_V, buckets, expected_gradient, reverse_kl_gradient, student_logits


def of_every_event(function, logits, **options):
    """Row y: the event y as the sampled one, all others as the rest. [V]."""
    return function(buckets(logits.log_softmax(0)), buckets(TEACHER_V), **options)


def gaps(logits):
    return (TEACHER_V - logits.log_softmax(0)).detach()


def test_sign_log_is_a_policy_gradient_with_a_shortened_gap():
    logits = student_logits()
    d = gaps(logits)
    assert (d > 0).any() and (d < 0).any()
    advantage = torch.tensor([math.copysign(math.log(1 + abs(gap)), gap) for gap in d.tolist()], dtype=torch.float64)
    (found,) = torch.autograd.grad(of_every_event(sign_log, logits).sum(), logits)
    (expected,) = torch.autograd.grad((-advantage * logits.log_softmax(0)).sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_every_event(sign_log, logits), -advantage * logits.log_softmax(0))


@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.0])
def test_power_is_a_policy_gradient_with_a_bounded_reward(alpha):
    logits = student_logits()
    reward = (TEACHER_V.exp() ** alpha - logits.softmax(0).detach() ** alpha) / alpha
    (found,) = torch.autograd.grad(of_every_event(power, logits, alpha=alpha).sum(), logits)
    (expected,) = torch.autograd.grad((-reward * logits.log_softmax(0)).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_a_small_power_is_the_reverse_kl_on_average():
    logits = student_logits()
    gradient = expected_gradient(of_every_event(power, logits, alpha=1e-7), logits)
    torch.testing.assert_close(gradient, reverse_kl_gradient(), atol=1e-6, rtol=1e-5)


def test_the_sign_gate_takes_the_forward_kl_where_the_teacher_finds_the_token_less_likely():
    logits = student_logits()
    d, student = gaps(logits), buckets(logits.log_softmax(0))
    expected = torch.where(d > 0, -d * logits.log_softmax(0), forward_kl(student, buckets(TEACHER_V)))
    found = of_every_event(sign_gate, logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), logits)[0] for each in (found, expected)))


def test_equal_models_teach_nothing_by_the_gate():
    logits = TEACHER_V.clone().requires_grad_()
    value = of_every_event(sign_gate, logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


def test_trust_takes_the_reverse_kl_within_its_bound_only():
    logits = student_logits()
    ratio = gaps(logits).exp().clamp_max(1.0)
    bound = float(ratio.sort().values[:2].mean())  # one event outside, one that the teacher finds less likely inside
    student, teacher = buckets(logits.log_softmax(0)), buckets(TEACHER_V)
    expected = torch.where(ratio > bound, reverse_kl(student, teacher), forward_kl(student, teacher))
    torch.testing.assert_close(of_every_event(trust, logits, bound=bound), expected)
    found = of_every_event(trust, logits, bound=bound)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), logits)[0] for each in (found, expected)))


def test_trust_clips_the_cost_of_each_bucket_outside_its_bound():
    logits = student_logits()
    bound = 0.5
    outside = gaps(logits).exp() <= bound
    assert outside.any() and not outside.all()
    student, teacher = buckets(logits.log_softmax(0)), buckets(TEACHER_V)
    cost = (student - teacher).detach().clamp(max=-math.log(bound))
    clipped = (student.exp() * cost).sum(1)
    expected = torch.where(outside, clipped, reverse_kl(student, teacher))
    found = of_every_event(trust, logits, bound=bound, outside="clipped")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), logits)[0] for each in (found, expected)))


def test_the_clipped_gradient_is_the_reverse_kls_where_nothing_is_cut():
    logits = student_logits()
    rows = buckets(logits.log_softmax(0)), buckets(TEACHER_V)
    costliest = float((rows[0] - rows[1]).max())
    value = _clipped(*rows, costliest + 1.0)
    torch.testing.assert_close(value, reverse_kl(*rows))
    gradients = [torch.autograd.grad(each.sum(), logits, retain_graph=True)[0] for each in (value, reverse_kl(*rows))]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("function", [sign_log, power, sign_gate, trust])
def test_an_empty_slot_adds_nothing(function):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    student.requires_grad_()
    empty = torch.full((6, 1), -math.inf, dtype=torch.float64)
    wide = [torch.cat([own[:, :1], empty, own[:, 1:]], 1) for own in (student, teacher)]
    for options in [{}, {"outside": "clipped", "bound": 0.95}] if function is trust else [{}]:
        found, expected = function(*wide, **options), function(student, teacher, **options)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(each.sum(), student)[0] for each in (found, expected)))


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (power, {"alpha": 0.0}, "alpha must be > 0, got 0.0"),
        (trust, {"bound": 1.0}, r"bound must be in \(0, 1\), got 1.0"),
        (trust, {"outside": "masked"}, "outside must be one of forward_kl, clipped, got 'masked'"),
    ],
)
def test_options_out_of_range_are_refused(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(4, 2), torch.zeros(4, 2), **options)


@pytest.mark.parametrize("function", [sign_log, power, sign_gate, trust])
def test_different_buckets_are_refused(function):
    with pytest.raises(ValueError, match="same buckets"):
        function(torch.zeros(4, 2), torch.zeros(4, 3))
