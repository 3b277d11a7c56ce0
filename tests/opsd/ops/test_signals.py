"""Hellinger distance and gradient norm against plain formulas and autograd."""

import math

import pytest
import torch

from opsd.ops.losses.divergences import reverse_kl
from opsd.ops.signals import hellinger, reverse_kl_grad_norm


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
