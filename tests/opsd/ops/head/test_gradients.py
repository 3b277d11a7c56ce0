"""The gradients of hidden and weight: exact on extreme rows, and handed over without a copy."""
# N rows, D width, V vocabulary, U support size

import pytest
import torch

from opsd.ops.head import gradients as head_gradients
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import DIVERGENCES, reverse_kl
from tests.opsd.ops.head.largest_tensor import LargestTensor
from tests.opsd.ops.head.reference import (
    D,
    N,
    V,
    logit_gradients,
    loss_and_gradients,
    make_support,
    peaked_head,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(PLANS, "cpu", PLANS["cpu"]._replace(block_columns=10))


def test_a_row_may_name_every_token_of_a_block():
    hidden, weight, teacher = peaked_head()
    support = torch.arange(10, 20).repeat(N, 1)  # the second block
    support[::2, 5:] = -1
    loss, grad_hidden, grad_weight = loss_and_gradients(hidden, weight, teacher, support, filter_threshold=0.0)
    grad = logit_gradients(hidden, weight, teacher, support, {})
    assert torch.isfinite(loss)
    torch.testing.assert_close(grad_hidden, grad @ weight.detach())
    torch.testing.assert_close(grad_weight, grad.T @ hidden.detach())


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_rows_of_a_nearly_certain_student_have_exact_gradients(name):
    """Normalised in float32, the buckets of such a row make its gradient a difference of rounded terms."""
    hidden = torch.cat([torch.linspace(14.0, 20.0, N).diag(), torch.randn(N, D)], dim=1)
    weight = torch.cat([torch.eye(V, N), 0.4 * torch.randn(V, D)], dim=1)
    hidden.requires_grad_(), weight.requires_grad_()
    support = torch.stack([torch.cat([torch.tensor([row]), torch.randperm(V - N)[:7] + N]) for row in range(N)])
    teacher = (hidden @ weight.T).detach().double() + 0.2 * torch.randn(N, V, dtype=torch.float64)
    divergence = DIVERGENCES[name]
    actual = loss_and_gradients(hidden, weight, teacher, support, divergence, filter_threshold=0.0)[1]
    exact_inputs = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = loss_and_gradients(*exact_inputs, teacher, support, divergence)[1]
    assert ((hidden @ weight.T).softmax(1).amax(1) > 0.99).all()
    assert ((actual - exact).norm(dim=1) <= 1e-4 * exact.norm(dim=1)).all()


def random_loss(num_rows=20, vocab=30, width=50, chunk_rows=5):
    hidden = torch.randn(num_rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    support = torch.stack([torch.randperm(vocab)[:4] for _ in range(num_rows)])
    teacher_logprobs = torch.randn(num_rows, 5).log_softmax(1)
    arguments = (support, teacher_logprobs, torch.ones(num_rows), reverse_kl)
    return hidden, weight, sparse_head_loss(hidden, weight, *arguments, chunk_rows=chunk_rows)[0]


def test_backward_copies_no_gradient():
    hidden, weight, loss = random_loss()
    with LargestTensor() as largest:
        loss.backward()
    assert weight.grad is not None
    assert hidden.grad is not None
    assert largest.numel <= len(hidden)  # zeros for the values of the rows, which have no gradient


def test_a_retained_graph_gives_the_same_gradients_whatever_happened_to_the_first_ones():
    hidden, weight, loss = random_loss()
    loss.backward(retain_graph=True)
    first = hidden.grad.clone(), weight.grad.clone()
    hidden.grad.zero_(), weight.grad.zero_()
    torch.testing.assert_close(torch.autograd.grad(2.0 * loss, (hidden, weight)), tuple(2.0 * grad for grad in first))


def test_a_second_backward_of_a_freed_graph_or_of_changed_weights_is_refused():
    _, _, loss = random_loss()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    _, weight, loss = random_loss()
    loss.backward(retain_graph=True)
    with torch.no_grad():
        weight += 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("vocab_size", [V, V - 20])
@pytest.mark.parametrize("beyond", [-2, -1, 0, 1])
@pytest.mark.parametrize("threshold", [0.0, 1e-12])
def test_shares_that_wait_in_the_gradient_of_the_weight_are_read_before_it_is_written(vocab_size, beyond, threshold):
    """Of the rows that there is just room for, of fewer, and of one more; then a chunk that adds to the gradient."""
    chunk_rows = D * V // vocab_size + beyond
    hidden, weight, teacher = peaked_head(sharpness=2.0)
    head = {"vocab_size": vocab_size}
    support = make_support(N, 4, head)
    arguments = (hidden, weight, teacher[:, :vocab_size], support)
    _, *grads = loss_and_gradients(*arguments, chunk_rows=chunk_rows, filter_threshold=threshold, **head)
    dense = torch.zeros(N, V, dtype=torch.float64)
    dense[:, :vocab_size] = logit_gradients(hidden, weight[:vocab_size], teacher[:, :vocab_size], support, {})
    torch.testing.assert_close(grads[0], dense @ weight.detach())
    torch.testing.assert_close(grads[1], dense.T @ hidden.detach())


def test_a_transposed_weight_gets_its_gradient():
    hidden, weight, teacher = peaked_head(sharpness=2.0)
    support = make_support(N, 4)
    transposed = weight.detach().T.contiguous().T.requires_grad_()
    _, *expected = loss_and_gradients(hidden, weight, teacher, support)
    _, *actual = loss_and_gradients(hidden, transposed, teacher, support)
    torch.testing.assert_close(actual, expected)


def test_a_large_product_is_the_exact_one():
    """Large ones go to another library; so do those of transposed and gathered operands."""
    generator = torch.Generator().manual_seed(0)
    left_MK, right_NK = (torch.randn(size, 300, generator=generator) for size in (500, 600))
    assert left_MK.numel() * len(right_NK) >= head_gradients.ONEDNN_FROM
    exact = left_MK.double() @ right_NK.double().T
    for right in (right_NK, right_NK.T.contiguous().T):
        torch.testing.assert_close(head_gradients.linear(left_MK, right).double(), exact, rtol=1e-5, atol=1e-4)
