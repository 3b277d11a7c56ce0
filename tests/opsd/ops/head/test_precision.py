"""What a head in bfloat16 loses: no more than the rounding of its inputs and of the gradients that it returns."""
# N rows, D width, V vocabulary, U support size

import pytest
import torch

from opsd.ops.head.gradients import ONEDNN_FROM, linear, product
from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import forward_kl, reverse_kl
from tests.opsd.ops.head.reference import dense_buckets, gradients

N, V, D, U = 48, 600, 64, 16
BFLOAT16_STEP = 2.0**-8  # relative, between neighbours; of a number near 20 it is 0.125, so a rounding is up to 0.06
EVERY_PLAN = pytest.mark.parametrize(
    "plan", [PLANS["cpu"]._replace(block_columns=128), PLANS["cuda"]], ids=["cpu", "cuda"]
)


def make_rows(dtype=torch.bfloat16):
    """Rows whose likeliest tokens have logits near 20, and a teacher that differs by half a nat."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64) / 8
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    hidden *= 20.0 / (hidden @ weight.T).amax(1, keepdim=True)
    hidden, weight = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight))
    teacher = (hidden.double() @ weight.double().T).detach()
    teacher += 0.5 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    support = teacher.topk(U, dim=1).indices
    return hidden, weight, support, dense_buckets(teacher, support)[0]


@EVERY_PLAN
@pytest.mark.parametrize("stop_ids", [(), (3, 5)])
def test_values_near_a_logit_of_twenty_are_those_of_the_same_inputs_in_float64(plan, stop_ids):
    hidden, weight, support, _ = make_rows()
    support = torch.arange(8, 8 + U).repeat(N, 1) if stop_ids else support
    logits = (hidden.double() @ weight.double().T).detach()
    assert logits.amax(1).min() > 19
    exact, exact_entropy = dense_buckets(logits, support, {"stop_ids": stop_ids})
    logprobs, entropy = bucket_logprobs(hidden, weight, support, plan=plan, stop_ids=stop_ids, chunk_rows=20)
    assert logprobs.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 2e-5  # of logits rounded to bfloat16: 0.1
    assert (entropy - exact_entropy).abs().max() < 2e-5


@EVERY_PLAN
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_gradients_near_a_logit_of_twenty_err_by_the_rounding_of_what_is_returned(plan, divergence):
    hidden, weight, support, teacher_logprobs = make_rows()
    token_weight = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    logits = hidden.double() @ weight.double().T
    value = divergence(dense_buckets(logits, support)[0], teacher_logprobs)
    exact = gradients((token_weight * value).sum(), hidden, weight)
    leaves = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    value = divergence(dense_buckets(leaves[0] @ leaves[1].T, support)[0], teacher_logprobs)
    exact = torch.autograd.grad((token_weight * value).sum(), leaves)  # not rounded to the dtype of a leaf
    loss, per_token = sparse_head_loss(
        hidden, weight, support, teacher_logprobs, token_weight, divergence, plan=plan, chunk_rows=20
    )
    assert (per_token - value.detach()).abs().max() < 2e-5
    # On CUDA the gradient in the logits is rounded before it is multiplied; errors of that size add up as noise does.
    allowed = 1.02 if plan.block_columns else 2.0
    for actual, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert actual.dtype == torch.bfloat16
        rounding = (wanted.bfloat16().double() - wanted).norm()
        assert rounding < BFLOAT16_STEP / 2 * wanted.norm()
        assert (actual.double() - wanted).norm() <= allowed * rounding


@pytest.mark.parametrize("num_rows", [3, 700])
def test_products_of_16_bit_factors_are_those_of_their_values(num_rows):
    """Small ones, and large ones that go to another library."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, 300, generator=generator) for size in (num_rows, 600))
    assert (left.numel() * len(right) >= ONEDNN_FROM) == (num_rows > 3)
    for dtype in (torch.bfloat16, torch.float16):
        left_MK, right_NK = left.to(dtype), right.to(dtype)
        exact = left_MK.double() @ right_NK.double().T
        for found in (linear(left_MK.float(), right_NK.float()), product(left_MK, right_NK.T)):
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
