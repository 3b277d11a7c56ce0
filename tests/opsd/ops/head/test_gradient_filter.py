"""The gradient filter: which columns it leaves out, how much work that saves, and how far off the gradients are."""
# N rows, D width, V vocabulary, U support size

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import forward_kl, reverse_kl
from tests.opsd.ops.head.reference import (
    EVERY_HEAD,
    D,
    N,
    V,
    dense_buckets,
    head_options,
    logit_gradients,
    loss_and_gradients,
    make_support,
    peaked_head,
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(PLANS, "cpu", PLANS["cpu"]._replace(block_columns=10))


class Products(TorchDispatchMode):
    """Multiplications in the matrix products inside, in units of rows x D."""

    count = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[1] / (N * D)
        return func(*args, **(kwargs or {}))


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
