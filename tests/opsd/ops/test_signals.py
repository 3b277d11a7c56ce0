"""Hellinger distance and gradient norm against plain formulas and autograd."""

import math

import pytest
import torch

from opsd.ops.losses.divergences import reverse_kl
from opsd.ops.signals import STATISTICS, hellinger, ier, reverse_kl_grad_norm, statistics_of, teacher_rank


def random_logits(seed, num_buckets=7):
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(20, num_buckets, generator=generator, dtype=torch.float64)


def test_hellinger_is_one_minus_the_overlap_of_the_roots():
    student, teacher = random_logits(0), random_logits(1)
    overlap = (student.softmax(1) * teacher.softmax(1)).sqrt().sum(1)
    torch.testing.assert_close(hellinger(student.log_softmax(1), teacher.log_softmax(1)), (1 - overlap).sqrt())


def test_hellinger_spans_0_to_1():
    models = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0], [0.5, 0.5]]).log()
    assert hellinger(*models).tolist() == [1.0, 0.0]


def test_gradient_norm_is_that_of_autograd_through_the_softmax():
    student, teacher = random_logits(0).requires_grad_(), random_logits(1).log_softmax(1)
    value = reverse_kl(student.log_softmax(1), teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    norm = reverse_kl_grad_norm(student.detach().log_softmax(1), teacher)
    torch.testing.assert_close(norm, gradient.square().sum(1).sqrt())


def test_gradient_norm_on_buckets_is_at_least_that_of_the_sparse_loss():
    """Four tokens share the rest bucket."""
    student, teacher = random_logits(0).requires_grad_(), random_logits(1).log_softmax(1)

    def coarse(logprobs):
        return torch.cat([logprobs[:, :3], logprobs[:, 3:].logsumexp(1, keepdim=True)], dim=1)

    value = reverse_kl(coarse(student.log_softmax(1)), coarse(teacher))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    norm = reverse_kl_grad_norm(coarse(student.detach().log_softmax(1)), coarse(teacher))
    assert (norm >= gradient.square().sum(1).sqrt()).all()


@pytest.mark.parametrize("signal", [hellinger, reverse_kl_grad_norm])
def test_a_bucket_impossible_for_both_adds_nothing(signal):
    student, teacher = random_logits(0).log_softmax(1), random_logits(1).log_softmax(1)
    empty = torch.full((20, 1), -math.inf, dtype=torch.float64)
    padded = signal(torch.cat([empty, student], 1), torch.cat([empty, teacher], 1))
    torch.testing.assert_close(padded, signal(student, teacher))


def test_the_norm_is_infinite_where_the_divergence_is():
    student, teacher = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.0, 0.5, 0.5]]).log()
    assert reverse_kl_grad_norm(student, teacher).item() == math.inf


@pytest.mark.parametrize("signal", [hellinger, reverse_kl_grad_norm])
def test_different_buckets_are_refused(signal):
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 1\)"):
        signal(torch.zeros(2, 3), torch.zeros(2, 1))


def named(num_rows, num_named):
    return torch.arange(num_named).repeat(num_rows, 1)


def expected_ier(student, teacher, clip=30.0):
    """Of one row of named tokens, expectations written out."""
    p = student.exp() / student.exp().sum()
    c = (student.exp().log() - student.exp().sum().log() - teacher).clamp(-clip, clip)
    length = 1 / p - 1
    baseline = (p * c * length).sum() / (p * length).sum()
    variance = (p * c**2).sum() - (p * c).sum() ** 2
    return variance / max(float((p * (c - baseline) ** 2 * length).sum() - variance), 1e-8)


def test_ier_is_the_variance_of_the_cost_over_the_noise_of_a_draw():
    student, teacher = random_logits(0).log_softmax(1), random_logits(1).log_softmax(1)
    value = ier(student, teacher, support_NU=named(20, 6))
    expected = torch.stack([expected_ier(*rows) for rows in zip(student[:, :6], teacher[:, :6], strict=True)])
    torch.testing.assert_close(value, expected)
    whole = ier(student, teacher, support_NU=named(20, 7))  # a row without a rest
    torch.testing.assert_close(whole, torch.stack([expected_ier(*r) for r in zip(student, teacher, strict=True)]))


def test_ier_is_finite_at_the_edges():
    """Equal models, one named token, and a token that only one model can say."""
    inf = math.inf
    student = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.0, 0.1], [0.5, 0.4, 0.1], [0.0, 0.6, 0.4]]).log()
    teacher = torch.tensor([[0.2, 0.3, 0.5], [0.4, 0.0, 0.6], [0.6, 0.0, 0.4], [0.3, 0.3, 0.4]]).log()
    support = torch.tensor([[0, 1], [0, -1], [0, 1], [0, 1]])
    value = ier(student, teacher, support_NU=support)
    assert value[0].abs() < 1e-5 and value[1] == 0 and value.isfinite().all() and (value >= 0).all()
    assert student[1, 1] == -inf and value[2] > 0


def test_the_rank_of_the_students_likeliest_token_is_the_teachers():
    student = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.1, 0.6]]).log()
    teacher = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.2, 0.1, 0.2], [0.1, 0.1, 0.3, 0.5]]).log()
    assert teacher_rank(student, teacher, support_NU=named(3, 3)).tolist() == [0, 2, 1]
    assert teacher_rank(student, teacher, support_NU=named(3, 4)).tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["ier_T", "teacher_rank_T"])
def test_an_empty_slot_changes_no_statistic_of_named_tokens(name):
    student, teacher = random_logits(0).log_softmax(1), random_logits(1).log_softmax(1)
    empty = torch.full((20, 1), -math.inf, dtype=torch.float64)
    padded = [torch.cat([own[:, :1], empty, own[:, 1:]], 1) for own in (student, teacher)]
    support = torch.cat([named(20, 1), torch.full((20, 1), -1), named(20, 6)[:, 1:]], 1)
    chosen = {name: STATISTICS[name]}
    torch.testing.assert_close(
        statistics_of(chosen, *padded, support)[name], statistics_of(chosen, student, teacher, named(20, 6))[name]
    )
