"""The divergences on buckets: definitions, edges and refusals."""
# N tokens, B buckets

import math

import pytest
import torch

from opsd.ops.losses.divergences import DIVERGENCES, forward_kl, jsd, reverse_kl, skew_forward_kl, skew_reverse_kl
from tests.oracle import dense_divergence

EVERY_DIVERGENCE = pytest.mark.parametrize("name", sorted(DIVERGENCES))


def random_logits(seed, num_tokens=50, num_buckets=9):
    generator = torch.Generator().manual_seed(seed)
    return 3.0 * torch.randn(num_tokens, num_buckets, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reverse_kl", {}),
        ("forward_kl", {}),
        ("jsd", {}),
        ("jsd", {"beta": 0.0}),
        ("jsd", {"beta": 0.2}),
        ("jsd", {"beta": 1.0}),
        ("skew_forward_kl", {}),
        ("skew_forward_kl", {"alpha": 0.0}),
        ("skew_forward_kl", {"alpha": 0.7}),
        ("skew_reverse_kl", {}),
        ("skew_reverse_kl", {"alpha": 0.0}),
        ("skew_reverse_kl", {"alpha": 0.7}),
        ("todi", {}),
        ("akl", {}),
        ("akl", {"head_mass": 0.2}),
        ("akl", {"head_mass": 0.9}),
        ("abkd", {}),
        ("abkd", {"alpha": 1.5, "beta": 0.3}),
        ("entropy_aware", {}),
        ("entropy_aware", {"threshold": 1.2}),
    ],
)
def test_each_entry_equals_its_definition_in_value_and_gradient(name, options):
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    actual = DIVERGENCES[name](student.log_softmax(1), teacher.log_softmax(1), **options)
    expected = dense_divergence(name, student, teacher, **options)
    torch.testing.assert_close(actual, expected)
    (actual_grad,) = torch.autograd.grad(actual.sum(), student)
    (expected_grad,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(actual_grad, expected_grad)
    assert (actual > 0.0).all()


def test_values_worked_out_by_hand():
    student = torch.tensor([[0.75, 0.25]]).log()
    teacher = torch.tensor([[0.5, 0.5]]).log()
    reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    forward = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    middle = 0.5 * (0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375))
    middle += 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375))
    skew_forward = 0.5 * math.log(0.5 / 0.725) + 0.5 * math.log(0.5 / 0.275)  # 0.1 teacher + 0.9 student
    skew_reverse = 0.75 * math.log(0.75 / 0.525) + 0.25 * math.log(0.25 / 0.475)  # 0.1 student + 0.9 teacher
    assert reverse_kl(student, teacher).item() == pytest.approx(reverse, rel=1e-5)
    assert forward_kl(student, teacher).item() == pytest.approx(forward, rel=1e-5)
    assert jsd(student, teacher).item() == pytest.approx(middle, rel=1e-5)
    assert skew_forward_kl(student, teacher).item() == pytest.approx(skew_forward, rel=1e-5)
    assert skew_reverse_kl(student, teacher).item() == pytest.approx(skew_reverse, rel=1e-5)


def test_jsd_ends_in_the_two_kls():
    student, teacher = random_logits(0).log_softmax(1), random_logits(1).log_softmax(1)
    assert torch.equal(jsd(student, teacher, beta=0.0), forward_kl(student, teacher))
    assert torch.equal(jsd(student, teacher, beta=1.0), reverse_kl(student, teacher))


@EVERY_DIVERGENCE
def test_a_bucket_impossible_for_both_adds_nothing_to_value_or_gradient(name):
    student, teacher = random_logits(0).log_softmax(1), random_logits(1).log_softmax(1)
    empty = torch.full((50, 2), -math.inf, dtype=torch.float64)
    results = []
    for slots in (empty[:, :0], empty):
        student_NB = torch.cat([slots, student], dim=1).requires_grad_()
        value = DIVERGENCES[name](student_NB, torch.cat([slots, teacher], dim=1))
        (grad,) = torch.autograd.grad(value.sum(), student_NB)
        results.append((value.detach(), grad))
    (value, grad), (padded_value, padded_grad) = results
    torch.testing.assert_close(padded_value, value, rtol=1e-14, atol=0.0)
    assert torch.equal(padded_grad[:, 2:], grad)
    assert torch.equal(padded_grad[:, :2], torch.zeros(50, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "student", "teacher", "expected"),
    [
        ("reverse_kl", [0.0, 1.0], [0.5, 0.5], math.log(2.0)),
        ("reverse_kl", [0.5, 0.5], [0.0, 1.0], math.inf),
        ("forward_kl", [0.5, 0.5], [0.0, 1.0], math.log(2.0)),
        ("forward_kl", [0.0, 1.0], [0.5, 0.5], math.inf),
        ("jsd", [1.0, 0.0], [0.0, 1.0], math.log(2.0)),
        ("skew_forward_kl", [1.0, 0.0], [0.0, 1.0], math.log(10.0)),
        ("skew_reverse_kl", [1.0, 0.0], [0.0, 1.0], math.log(10.0)),
    ],
)
def test_mass_on_one_side_only(name, student, teacher, expected):
    student_NB = torch.tensor([student]).log().requires_grad_()
    value = DIVERGENCES[name](student_NB, torch.tensor([teacher]).log())
    assert value.item() == pytest.approx(expected)
    if math.isfinite(expected):
        (grad,) = torch.autograd.grad(value.sum(), student_NB)
        assert grad.isfinite().all()


def test_a_mixture_with_share_0_leaves_no_mass_where_the_other_side_has_none():
    student, teacher = torch.tensor([[0.0, 1.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert skew_forward_kl(student, teacher, alpha=0.0).item() == math.inf


@EVERY_DIVERGENCE
def test_different_buckets_are_refused(name):
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 1\)"):
        DIVERGENCES[name](torch.zeros(2, 3), torch.zeros(2, 1))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_to_1_is_refused(share):
    student = teacher = torch.tensor([[0.5, 0.5]]).log()
    with pytest.raises(ValueError, match="beta"):
        jsd(student, teacher, beta=share)
    with pytest.raises(ValueError, match="alpha"):
        skew_forward_kl(student, teacher, alpha=share)
    with pytest.raises(ValueError, match="alpha"):
        skew_reverse_kl(student, teacher, alpha=share)
