"""The chunked head against dense float64 computations: values and gradients."""
# N rows, D width, V vocabulary, U support size, B = U + 1 buckets

import math

import pytest
import torch

from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.losses.divergences import DIVERGENCES, reverse_kl
from tests.opsd.ops.head.reference import (
    EVERY_HEAD,
    assert_near,
    dense_buckets,
    gradients,
    head_options,
    known_of,
    make_head,
    make_support,
    tempered_teacher,
)
from tests.oracle import dense_divergence

EVERY_DIVERGENCE = pytest.mark.parametrize("name", sorted(DIVERGENCES))
DETACHED = {"todi", "akl"}  # their gradient is not the derivative of their value
NO_BOUND = {"akl", "abkd"}  # the coarse value may exceed the dense one


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@EVERY_DIVERGENCE
@pytest.mark.parametrize("fused", [True, False])
def test_naming_every_token_equals_the_dense_divergence(name, fused):
    hidden, weight, teacher = make_head()
    support = torch.stack([torch.randperm(16) for _ in range(7)])
    teacher_logprobs = teacher.log_softmax(1).gather(1, support).float()
    teacher_logprobs = torch.cat([teacher_logprobs, torch.full((7, 1), -math.inf)], dim=1)
    token_weight = torch.rand(7)
    if fused:
        loss, per_token = sparse_head_loss(
            hidden, weight, support, teacher_logprobs, token_weight, DIVERGENCES[name], chunk_rows=3
        )
    else:
        logprobs, _ = bucket_logprobs(hidden, weight, support, chunk_rows=3)
        per_token = DIVERGENCES[name](logprobs, teacher_logprobs)
        loss = (token_weight * per_token).sum()
    expected = dense_divergence(name, hidden.double() @ weight.double().T, teacher)
    assert_near(per_token, expected, 1e-5)
    expected_grads = gradients((token_weight * expected).sum(), hidden, weight)
    for actual, wanted in zip(gradients(loss, hidden, weight), expected_grads, strict=True):
        assert_near(actual, wanted, 1e-5)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - NO_BOUND))
def test_a_strict_support_bounds_the_dense_divergence_from_below(name):
    hidden, weight, teacher = make_head()
    support = make_support(7, 4)
    teacher_logprobs, _ = dense_buckets(teacher, support)
    _, per_token = sparse_head_loss(hidden, weight, support, teacher_logprobs, torch.ones(7), DIVERGENCES[name])
    dense = dense_divergence(name, hidden.double() @ weight.double().T, teacher)
    assert (per_token > 0.0).all()
    assert (per_token < dense).all()


@EVERY_DIVERGENCE
@EVERY_HEAD
def test_the_fused_loss_has_value_and_gradient_of_the_coarse_divergence(name, head):
    hidden, weight, teacher = make_head()
    options = head_options(head, 7)
    support = make_support(7, 4, options)
    teacher_logprobs = known_of(teacher, support, options)
    token_weight = torch.rand(7)
    loss, per_token = sparse_head_loss(
        hidden, weight, support, teacher_logprobs, token_weight, DIVERGENCES[name], chunk_rows=2, **options
    )
    logits = hidden.double() @ weight.double().T
    student_logprobs, _ = dense_buckets(logits, support, options)
    coarse = DIVERGENCES[name](student_logprobs, tempered_teacher(teacher_logprobs, logits, support, options))
    assert_near(per_token, coarse, 1e-5)
    expected_grads = gradients((token_weight * coarse).sum(), hidden, weight)
    for actual, wanted in zip(gradients(loss, hidden, weight), expected_grads, strict=True):
        assert_near(actual, wanted, 1e-5)


@EVERY_HEAD
@pytest.mark.parametrize("entropy_share", [0.0, 1.0])
def test_buckets_and_entropy_equal_a_dense_computation(head, entropy_share):
    hidden, weight, _ = make_head()
    options = head_options(head, 7)
    support = make_support(7, 4, options)
    logprobs, entropy = bucket_logprobs(hidden, weight, support, chunk_rows=2, **options)
    dense_logprobs, dense_entropy = dense_buckets(hidden.double() @ weight.double().T, support, options)
    torch.testing.assert_close(logprobs.double(), dense_logprobs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), dense_entropy, rtol=1e-5, atol=1e-6)
    upstream = (torch.rand(logprobs.shape), torch.full((7,), entropy_share))  # of empty slots too: it must not matter
    actual = torch.autograd.grad((logprobs, entropy), (hidden, weight), upstream)
    upstream_64 = tuple(grad.double() for grad in upstream)
    expected = torch.autograd.grad((dense_logprobs, dense_entropy), (hidden, weight), upstream_64)
    for left, right in zip(actual, expected, strict=True):
        assert_near(left, right.double(), 1e-5)


@EVERY_HEAD
def test_gradcheck_of_buckets_and_entropy(head):
    hidden, weight, _ = make_head(num_rows=3, dtype=torch.float64)
    options = head_options(head, 3)
    support = make_support(3, 4, options)
    possible = torch.cat([support >= 0, torch.ones(3, 1, dtype=torch.bool)], dim=1)

    def finite_outputs(hidden, weight):
        logprobs, entropy = bucket_logprobs(hidden, weight, support, chunk_rows=2, **options)
        return logprobs[possible], entropy

    assert torch.autograd.gradcheck(finite_outputs, (hidden, weight))


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - DETACHED))
def test_gradcheck_of_the_fused_loss(name):
    hidden, weight, teacher = make_head(num_rows=3, dtype=torch.float64)
    # Without a temperature: the teacher's then depends on the student, and counts as a constant in the gradient.
    options = {"vocab_size": 14, "stop_ids": (9, 2)}
    support = make_support(3, 4, options)
    teacher_logprobs, _ = dense_buckets(teacher, support, options)

    def loss(hidden, weight):
        token_weight = torch.tensor([0.5, 1.0, 2.0])
        arguments = (support, teacher_logprobs, token_weight, DIVERGENCES[name])
        return sparse_head_loss(hidden, weight, *arguments, chunk_rows=2, **options)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@EVERY_DIVERGENCE
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(name):
    hidden, weight, _ = make_head()
    support = make_support(7, 4)
    teacher_logprobs = bucket_logprobs(hidden, weight, support)[0].detach()
    loss, per_token = sparse_head_loss(hidden, weight, support, teacher_logprobs, torch.ones(7), DIVERGENCES[name])
    assert per_token.abs().max() < 1e-6
    assert max(grad.abs().max() for grad in gradients(loss, hidden, weight)) < 1e-5


def test_bfloat16_errs_no_more_than_plain_pytorch_in_bfloat16():
    hidden, weight, teacher = make_head(num_rows=64, vocab=512, width=64, dtype=torch.bfloat16)
    with torch.no_grad():
        weight /= 4.0
    support = teacher.topk(16, dim=1).indices
    teacher_logprobs, _ = dense_buckets(teacher, support)

    def value_and_gradients(logprobs):
        value = reverse_kl(logprobs, teacher_logprobs.to(logprobs.dtype)).sum()
        return [value.detach().double(), *gradients(value, hidden, weight)]

    plain_logprobs = (hidden @ weight.T).log_softmax(1)
    outside = plain_logprobs.scatter(1, support, -math.inf).logsumexp(1, keepdim=True)
    plain = value_and_gradients(torch.cat([plain_logprobs.gather(1, support), outside], dim=1))
    oracle = value_and_gradients(dense_buckets(hidden.double() @ weight.double().T, support)[0])
    loss, _ = sparse_head_loss(hidden, weight, support, teacher_logprobs.float(), torch.ones(64), reverse_kl)
    fused = [loss.detach().double(), *gradients(loss, hidden, weight)]
    two_step = value_and_gradients(bucket_logprobs(hidden, weight, support, chunk_rows=9)[0])
    for ours in (fused, two_step):
        for actual, baseline, exact in zip(ours, plain, oracle, strict=True):
            assert (actual - exact).norm() <= 1.1 * (baseline - exact).norm()


def test_the_rest_keeps_its_logarithm_where_its_mass_underflows():
    logits = torch.zeros(1, 6)
    logits[0, 2:] = -200.0
    logprobs, entropy = bucket_logprobs(logits, torch.eye(6), torch.tensor([[0, 1]]))
    torch.testing.assert_close(logprobs[0, 2].item(), -200.0 + math.log(4.0) - math.log(2.0))
    torch.testing.assert_close(entropy.item(), math.log(2.0))


def test_a_rank_that_keeps_no_row_has_loss_zero_and_zero_gradients():
    _, weight, _ = make_head()
    hidden = torch.zeros(0, 5, requires_grad=True)
    support = torch.zeros(0, 4, dtype=torch.int64)
    loss, per_token = sparse_head_loss(hidden, weight, support, torch.zeros(0, 5), torch.zeros(0), reverse_kl)
    logprobs, entropy = bucket_logprobs(hidden, weight, support)
    assert loss.item() == 0.0
    assert per_token.shape == entropy.shape == (0,)
    for total in (loss, logprobs.sum() + entropy.sum()):
        grad_hidden, grad_weight = gradients(total, hidden, weight)
        assert grad_hidden.shape == (0, 5)
        assert grad_weight.shape == (16, 5)
        assert not grad_weight.any()


def test_backward_scales_with_the_upstream_gradient_and_can_run_twice():
    hidden, weight, teacher = make_head()
    support = make_support(7, 4)
    teacher_logprobs = dense_buckets(teacher, support)[0].float()
    loss, _ = sparse_head_loss(hidden, weight, support, teacher_logprobs, torch.ones(7), reverse_kl)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    thrice = torch.autograd.grad(3.0 * loss, (hidden, weight))
    torch.testing.assert_close(thrice, tuple(3.0 * grad for grad in once))
