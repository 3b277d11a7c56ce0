"""The exact head at its edges: memory, the filter, rows that do not count, what it refuses."""
# N rows, D width of the student, V rows of the student's head

import math

import pytest
import torch

from opsd.ops.head.exact import exact_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import DIVERGENCES, reverse_kl
from opsd.ops.losses.objective import Loss, Objective
from tests.opsd.ops.head.exact_reference import D, N, V, by_name, dense_results, make_pair, results, row_weights
from tests.opsd.ops.head.largest_tensor import LargestTensor
from tests.opsd.ops.head.reference import assert_near

SMALL = PLANS["cpu"]._replace(block_columns=10)


@pytest.mark.parametrize("name", ["reverse_kl", "akl"])
@pytest.mark.parametrize("num_rows", [20, 60])
def test_no_tensor_grows_with_rows_times_vocabulary(name, num_rows):
    """`akl` ranks all tokens of a row, a few rows at a time."""
    pair = make_pair(num_rows, vocab=100, teacher_vocab=100, width=4, teacher_width=6)
    with LargestTensor() as largest:
        exact_head_loss(*pair, row_weights(num_rows), DIVERGENCES[name], chunk_rows=5, plan=SMALL)[0].backward()
    assert largest.numel == 2 * 5 * 100


@pytest.mark.parametrize("num_rows", [40, 90])
def test_chunks_keep_to_the_memory_of_the_plan(num_rows):
    """Two numbers per row and token, so half as many rows as the sparse head has; the first chunk's in the gradient."""
    plan, seen = SMALL._replace(chunk_bytes=20 * 2 * 4 * 100), []

    def watched(student_NC, teacher_NC):
        seen.append(len(student_NC))
        return reverse_kl(student_NC, teacher_NC)

    pair = make_pair(num_rows, vocab=100, teacher_vocab=100, width=64)
    with LargestTensor() as largest:
        exact_head_loss(*pair, row_weights(num_rows), Loss(watched, by_token=True), plan=plan)
    assert max(seen) <= 32  # 64 numbers per token in the gradient
    assert largest.numel <= max(64 * 100, 2 * 20 * 100)


@pytest.mark.parametrize("beyond", [-1, 0, 1])
@pytest.mark.parametrize("threshold", [0.0, 1e-12])
def test_shares_that_wait_in_the_gradient_of_the_weight_are_read_before_it_is_written(beyond, threshold):
    pair = make_pair(num_rows=12, width=8, dtype=torch.float64)
    options = {"chunk_rows": 4 + beyond, "filter_threshold": threshold, "plan": SMALL, "vocab_size": V}
    found = results(pair, DIVERGENCES["forward_kl"], **options)
    for actual, wanted in zip(found, dense_results("forward_kl", pair, {"vocab_size": V}), strict=True):
        assert_near(actual, wanted, 1e-10)


@pytest.mark.parametrize(("hidden_learns", "weight_learns"), [(True, False), (False, True), (False, False)])
def test_only_gradients_that_are_needed_are_formed(hidden_learns, weight_learns):
    pair = make_pair(num_rows=6, dtype=torch.float64)
    expected = dense_results("jsd", pair, {"vocab_size": V})
    pair[0].requires_grad_(hidden_learns), pair[1].requires_grad_(weight_learns)
    loss, per_token = exact_head_loss(*pair, row_weights(6), DIVERGENCES["jsd"], vocab_size=V, chunk_rows=4)
    assert_near(per_token, expected[0], 1e-10)
    assert loss.requires_grad == (hidden_learns or weight_learns)
    if loss.requires_grad:
        loss.backward()
    for tensor, learns, wanted in zip(pair, (hidden_learns, weight_learns), expected[1:], strict=False):
        assert (tensor.grad is not None) == learns
        if learns:
            assert_near(tensor.grad, wanted, 1e-10)


def test_without_autograd_it_is_a_value():
    pair = make_pair(num_rows=6)
    with torch.no_grad():
        loss, per_token = exact_head_loss(*pair, row_weights(6), DIVERGENCES["akl"], vocab_size=V, chunk_rows=4)
    assert not loss.requires_grad
    assert_near(per_token, dense_results("akl", pair, {"vocab_size": V})[0], 1e-5)


@pytest.mark.parametrize("name", ["reverse_kl", "akl"])
def test_a_rank_that_keeps_no_row_has_loss_zero_and_zero_gradients(name):
    pair = make_pair(num_rows=0)
    per_token, grad_hidden, grad_weight = results(pair, DIVERGENCES[name], vocab_size=V)
    assert per_token.shape == (0,) and grad_hidden.shape == (0, D)
    assert grad_weight.shape == (V, D) and not grad_weight.any()


def test_rows_of_weight_zero_are_valued_and_teach_nothing():
    pair, weight = make_pair(), torch.ones(N)
    weight[2:5] = 0.0
    loss, per_token = exact_head_loss(*pair, weight, DIVERGENCES["reverse_kl"], vocab_size=V)
    assert_near(per_token, dense_results("reverse_kl", pair, {"vocab_size": V})[0], 1e-5)
    (grad,) = torch.autograd.grad(loss, pair[0])
    assert not grad[2:5].any() and grad[:2].all(1).all()


def test_backward_scales_with_the_upstream_gradient_and_can_run_twice():
    pair = make_pair()
    loss, _ = exact_head_loss(*pair, row_weights(N), DIVERGENCES["todi"], vocab_size=V)
    once = torch.autograd.grad(loss, pair[:2], retain_graph=True)
    thrice = torch.autograd.grad(3.0 * loss, pair[:2])
    torch.testing.assert_close(thrice, tuple(3.0 * grad for grad in once))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_the_filter_errs_within_its_bound_and_only_in_the_columns_that_it_leaves_out(name):
    pair, threshold = make_pair(num_rows=12, vocab=60, teacher_vocab=60, dtype=torch.float64, scale=2.0), 1e-3
    options = {"plan": SMALL, "chunk_rows": 4}
    exact = results(pair, DIVERGENCES[name], filter_threshold=0.0, **options)
    filtered = results(pair, DIVERGENCES[name], filter_threshold=threshold, **options)
    hidden, weight = (tensor.detach() for tensor in pair[:2])
    logits = (hidden @ weight.T).requires_grad_()
    identity = (logits, torch.eye(60, dtype=torch.float64).requires_grad_(), *pair[2:])
    row_sum = dense_results(name, identity, {})[1].abs().sum(1)
    assert torch.equal(filtered[0], exact[0])
    error_hidden, error_weight = ((f - e).norm(dim=1) for f, e in zip(filtered[1:], exact[1:], strict=True))
    assert (error_hidden > 1e-12).any()  # something was left out
    assert (error_hidden <= threshold * 60 * weight.norm(dim=1).max() * row_sum).all()
    assert (error_weight <= threshold * (hidden.norm(dim=1) * row_sum).sum()).all()
    assert (error_weight <= 1e-12).any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("model", [0, 2], ids=["student", "teacher"])
def test_a_diverged_row_is_seen_in_its_value_and_in_both_gradients(value, model):
    pair = make_pair()
    with torch.no_grad():
        pair[model][3, 0] = value
    per_token, grad_hidden, grad_weight = results(
        pair, DIVERGENCES["reverse_kl"], plan=SMALL, vocab_size=V, filter_threshold=1e-2
    )
    assert per_token.isfinite().tolist() == [row != 3 for row in range(N)]
    assert not grad_hidden[3].isfinite().any() and grad_hidden[:3].isfinite().all()
    assert not grad_weight.isfinite().all(1).any()


def test_a_loss_of_ones_own_that_is_a_sum_over_tokens():
    def squares(student_logprobs_NB, teacher_logprobs_NB, *, scale_N):
        return scale_N * (student_logprobs_NB.exp() - teacher_logprobs_NB.exp()).square().sum(-1)

    pair, scale = make_pair(), torch.linspace(1.0, 2.0, N)
    own = Loss(squares, inputs=("scale_N",), by_token=True)
    found = results(pair, own, plan=SMALL, vocab_size=V, row_inputs={"scale_N": scale, "other_N": scale})
    expected = dense_results("abkd", pair, {"vocab_size": V}, alpha=1.0, beta=1.0)  # half the squares
    assert_near(found[0], 2.0 * scale * expected[0], 1e-5)


@pytest.mark.parametrize(
    ("divergence", "named"),
    [
        (reverse_kl, r"the loss \(opsd.ops.losses.divergences.reverse_kl\)"),
        (by_name("kdrl", coefficient=0.1), r"the loss \(opsd.ops.losses.policy.kdrl\(coefficient=0.1\)\)"),
        (
            Objective(parts=((1.0, by_name("jsd")), (0.1, by_name("pearson")), (0.1, by_name("sinkhorn")))),
            r"not: the loss \(opsd.ops.losses.terms.pearson\), the loss \(opsd.ops.losses.terms.sinkhorn\)$",
        ),
    ],
)
def test_losses_that_are_no_sums_over_tokens_are_refused_by_name(divergence, named):
    with pytest.raises(ValueError, match=f"must be a sum over tokens.*{named}"):
        exact_head_loss(*make_pair(), torch.ones(N), divergence, vocab_size=V)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "the heads have 23 and 26 rows: give vocab_size"),
        ({"vocab_size": 24}, r"vocab_size must be in 1..23"),
        ({"vocab_size": 27}, r"vocab_size must be in 1..26, the rows of the teacher's head, got 27"),
        ({"vocab_size": 20, "stop_ids": (3, 20)}, "stop_ids must be distinct and in 0..19"),
        ({"vocab_size": 20, "chunk_rows": 0}, "chunk_rows must be at least 1"),
        ({"vocab_size": 20, "filter_threshold": -1.0}, "filter_threshold"),
        ({"vocab_size": 20, "temperature_N": torch.ones(3)}, "temperature_N"),
        ({"vocab_size": 20, "weight_N": torch.ones(3)}, "weight_N"),
        ({"vocab_size": 20, "teacher_hidden_NE": torch.ones(3, 8)}, "teacher_hidden_NE"),
        ({"vocab_size": 20, "teacher_weight_WE": torch.ones(26, 7)}, "teacher_weight_WE"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(changed, message):
    names = ("hidden_ND", "weight_VD", "teacher_hidden_NE", "teacher_weight_WE")
    arguments = {**dict(zip(names, make_pair(), strict=True)), "weight_N": torch.ones(N), **changed}
    with pytest.raises(ValueError, match=message):
        exact_head_loss(**arguments, divergence=DIVERGENCES["reverse_kl"])
