"""The gradient filter and the hand-over of the gradients: what is left out, how far off that is, what is not copied."""
# N rows, D width, V vocabulary, U support size

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.ops.head import gradients as head_gradients
from opsd.ops.head import plan as head_plan
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import DIVERGENCES, forward_kl, reverse_kl
from tests.opsd.ops.head.test_loss import (
    EVERY_HEAD,
    LargestTensor,
    dense_buckets,
    head_options,
    known_of,
    make_support,
    tempered_teacher,
)

N, V, D = 12, 64, 6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(head_plan.PLANS, "cpu", head_plan.PLANS["cpu"]._replace(block_columns=10))


class Products(TorchDispatchMode):
    """Multiplications in the matrix products inside, in units of rows x D."""

    count = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[1] / (N * D)
        return func(*args, **(kwargs or {}))


def peaked_head(sharpness=8.0, dtype=torch.float64):
    """hidden [N, D] and weight [V, D] whose rows each find a few tokens likely, and teacher logits [N, V]."""
    hidden = (sharpness * torch.randn(N, D, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, 2.0 * torch.randn(N, V, dtype=torch.float64)


def loss_and_gradients(hidden, weight, teacher_logits, support, divergence=reverse_kl, **options):
    head = {key: value for key, value in options.items() if key in ("temperature_N", "vocab_size", "stop_ids")}
    teacher_logprobs = known_of(teacher_logits, support, head)
    token_weight = torch.linspace(0.5, 1.5, len(hidden), dtype=torch.float64)
    loss, _ = sparse_head_loss(hidden, weight, support, teacher_logprobs, token_weight, divergence, **options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def logit_gradients(hidden, weight, teacher_logits, support, head):
    """dL/dlogits [N, V] by autograd through the dense float64 buckets."""
    logits = (hidden.double() @ weight.double().T).detach().requires_grad_()
    teacher_logprobs = tempered_teacher(known_of(teacher_logits, support, head), logits, support, head)
    value = reverse_kl(dense_buckets(logits, support, head)[0], teacher_logprobs)
    token_weight = torch.linspace(0.5, 1.5, len(hidden), dtype=torch.float64)
    return torch.autograd.grad((token_weight * value).sum(), logits)[0]


def test_a_row_may_name_every_token_of_a_block():
    hidden, weight, teacher = peaked_head()
    support = torch.arange(10, 20).repeat(N, 1)  # the second block
    support[::2, 5:] = -1
    loss, grad_hidden, grad_weight = loss_and_gradients(hidden, weight, teacher, support, filter_threshold=0.0)
    grad = logit_gradients(hidden, weight, teacher, support, {})
    assert torch.isfinite(loss)
    torch.testing.assert_close(grad_hidden, grad @ weight.detach())
    torch.testing.assert_close(grad_weight, grad.T @ hidden.detach())


@EVERY_HEAD
@pytest.mark.parametrize("threshold", [1e-3, 1e-2])
@pytest.mark.parametrize("chunk_rows", [1, 4])
def test_the_filter_errs_within_its_bound_and_only_in_the_columns_that_it_leaves_out(head, threshold, chunk_rows):
    hidden, weight, teacher = peaked_head()
    options = head_options(head, N)
    support = make_support(N, 4, options)
    arguments = (hidden, weight, teacher, support)
    loss, exact_hidden, exact_weight = loss_and_gradients(*arguments, chunk_rows=chunk_rows, **options)
    filtered_loss, hidden_grad, weight_grad = loss_and_gradients(
        *arguments, chunk_rows=chunk_rows, filter_threshold=threshold, **options
    )
    grad = logit_gradients(*arguments, options)
    row_sum = grad.abs().sum(1, keepdim=True)
    small = grad.abs() <= threshold * row_sum
    left_out = torch.stack([chunk.all(0) for chunk in small.split(chunk_rows)])  # [chunks, V]
    most_left_out = left_out.sum(1).max()
    error_hidden = (hidden_grad - exact_hidden).norm(dim=1)
    error_weight = (weight_grad - exact_weight).norm(dim=1)
    assert torch.equal(filtered_loss, loss)
    assert (error_hidden > 0).any()  # something was left out
    assert (error_hidden <= threshold * most_left_out * weight.norm(dim=1).max() * row_sum[:, 0]).all()
    assert (error_weight <= threshold * (hidden.norm(dim=1) * row_sum[:, 0]).sum()).all()
    assert (error_weight[: left_out.shape[1]][~left_out.any(0)] <= 1e-12).all()


def test_the_filter_does_less_work_and_none_at_all_when_off():
    hidden, weight, teacher = peaked_head()
    support = make_support(N, 4)
    columns = {}
    for threshold in (None, 0.0, 1e-2):
        with Products() as products:
            loss_and_gradients(hidden, weight, teacher, support, filter_threshold=threshold)
        columns[threshold] = products.count
    assert columns[None] == columns[0.0] == 3 * V  # float64: off
    assert columns[1e-2] < 2.6 * V


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_the_default_filter_leaves_columns_out_and_stays_below_the_rounding_of_the_dtype(dtype, allowed):
    hidden, weight, teacher = peaked_head(sharpness=12.0, dtype=dtype)
    support = make_support(N, 4)
    results, columns = [], []
    for threshold in (None, 0.0):
        with Products() as products:
            results.append(
                loss_and_gradients(hidden, weight, teacher, support, chunk_rows=2, filter_threshold=threshold)
            )
        columns.append(products.count)
    assert columns[0] < columns[1]
    for filtered, exact in zip(*results, strict=True):
        assert (filtered - exact).norm() <= allowed * exact.norm()


def test_the_filter_keeps_what_forward_kl_asks_of_tokens_that_the_student_finds_impossible():
    hidden = torch.tensor([[40.0, 0.0]], requires_grad=True)  # a probability of e-40 for all tokens but the first
    weight = torch.zeros(V, 2)
    weight[0, 0] = 1.0
    weight[1:, 1] = torch.linspace(-1.0, 1.0, V - 1)
    weight.requires_grad_()
    teacher = torch.zeros(1, V, dtype=torch.float64)
    arguments = (hidden, weight, teacher, torch.tensor([[0]]), forward_kl)
    _, grad_hidden, grad_weight = loss_and_gradients(*arguments)
    _, exact_hidden, exact_weight = loss_and_gradients(*arguments, filter_threshold=0.0)
    assert exact_weight[1:, 0].abs().min() > 0.1  # the gradient is there, whatever the probability
    torch.testing.assert_close((grad_hidden, grad_weight), (exact_hidden, exact_weight))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_filter_hides_no_diverged_row(value):
    hidden, weight, teacher = peaked_head(dtype=torch.float32)
    with torch.no_grad():
        hidden[3, 0] = value
    _, grad_hidden, grad_weight = loss_and_gradients(hidden, weight, teacher, make_support(N, 4), filter_threshold=1e-2)
    assert not grad_hidden[3].isfinite().any()
    assert not grad_weight.isfinite().all(1).any()


def test_rows_of_weight_zero_have_no_say_in_what_is_kept():
    hidden, weight, teacher = peaked_head()
    support = make_support(N, 4)
    teacher_logprobs, _ = dense_buckets(teacher, support)
    columns = []
    for share in (0.0, 1.0):
        token_weight = torch.full((N,), share, dtype=torch.float64)
        arguments = (hidden, weight, support, teacher_logprobs, token_weight, reverse_kl)
        with Products() as products:
            loss, _ = sparse_head_loss(*arguments, filter_threshold=1e-3)
        columns.append(products.count)
        assert any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight))) == (share > 0.0)
    assert columns[0] == V < columns[1]  # the logits only


def test_a_temperature_that_the_hidden_rows_make_up_for_changes_nothing_that_is_kept():
    hidden, weight, teacher = peaked_head()
    support = make_support(N, 4)
    columns = []
    for temperature in (1.0, 32.0):
        scaled = (temperature * hidden).detach().requires_grad_()
        options = {"temperature_N": torch.full((N,), temperature, dtype=torch.float64)}
        teacher_logprobs, _ = dense_buckets(teacher, support)
        arguments = (scaled, weight, support, teacher_logprobs, torch.ones(N), reverse_kl)
        with Products() as products:
            sparse_head_loss(*arguments, filter_threshold=1e-2, **options)
        columns.append(products.count)
    assert columns[0] == columns[1]


@pytest.mark.parametrize("threshold", [-1e-9, math.nan])
def test_a_threshold_that_is_none_is_refused_by_name(threshold):
    hidden, weight, teacher = peaked_head()
    with pytest.raises(ValueError, match="filter_threshold"):
        loss_and_gradients(hidden, weight, teacher, make_support(N, 4), filter_threshold=threshold)


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


@pytest.mark.parametrize(
    ("frozen", "num_rows", "expected"),
    [
        (True, 0, []),
        (True, 5, [5]),
        (True, 10, [10]),
        (True, 11, [5, 6]),
        (True, 41, [5, 9, 9, 9, 9]),
        (False, 0, []),
        (False, 18, [18]),  # the gradient has room for 18, chunk_bytes for blocks of 21
        (False, 19, [12, 7]),
        (False, 41, [14, 9, 9, 9]),
    ],
)
def test_rows_are_divided_evenly_within_the_memory_budget(monkeypatch, frozen, num_rows, expected):
    small = head_plan.PLANS["cpu"]._replace(chunk_bytes=10 * 4 * V + 3)
    monkeypatch.setitem(head_plan.PLANS, "cpu", small)
    seen = []

    def divergence(student, teacher):
        seen.append(len(student))
        return reverse_kl(student, teacher)

    support, weight_N = torch.zeros(num_rows, 1, dtype=torch.int64), torch.ones(num_rows)
    teacher_logprobs = torch.full((num_rows, 2), math.log(0.5))
    hidden, weight = torch.zeros(num_rows, 3 * D), torch.zeros(V, 3 * D, requires_grad=not frozen)
    sparse_head_loss(hidden, weight, support, teacher_logprobs, weight_N, divergence)
    assert seen == expected


def test_a_large_product_is_the_exact_one():
    """Large ones go to another library; so do those of transposed and gathered operands."""
    generator = torch.Generator().manual_seed(0)
    left_MK, right_NK = (torch.randn(size, 300, generator=generator) for size in (500, 600))
    assert left_MK.numel() * len(right_NK) >= head_gradients.ONEDNN_FROM
    exact = left_MK.double() @ right_NK.double().T
    for right in (right_NK, right_NK.T.contiguous().T):
        torch.testing.assert_close(head_gradients.linear(left_MK, right).double(), exact, rtol=1e-5, atol=1e-4)
