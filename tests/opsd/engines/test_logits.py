"""Logits of any head, and the draw of a token: its distribution, and what top_k and top_p leave of it."""

import pytest
import torch

from opsd.engines.logits import draw, float32_logits, uniforms
from opsd.engines.sampling import Sampling
from opsd.ops.head.form import HeadForm


def test_draws_follow_the_distribution_at_the_temperature():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    numbers = uniforms(seed=0, num_draws=20_000)
    sampling = Sampling(temperature=0.5, top_p=1.0, max_tokens=1, num_candidates=1)
    tokens = draw(logits.expand(20_000, 4), sampling, numbers)
    frequency = torch.bincount(tokens, minlength=4) / 20_000
    torch.testing.assert_close(frequency, (logits[0] / 0.5).softmax(-1), atol=0.01, rtol=0)


def test_top_k_keeps_the_likeliest():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0]])
    numbers = uniforms(seed=0, num_draws=5_000)
    for top_k, kept in [(1, {0}), (2, {0, 2}), (9, {0, 1, 2, 3}), (0, {0, 1, 2, 3})]:
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=1, num_candidates=1, top_k=top_k)
        assert set(draw(logits.expand(5_000, 4), sampling, numbers).tolist()) == kept


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    numbers = uniforms(seed=0, num_draws=5_000)
    for top_p, kept in [(0.4, {1}), (0.6, {1, 3}), (0.9, {1, 2, 3}), (1.0, {0, 1, 2, 3})]:
        sampling = Sampling(temperature=1.0, top_p=top_p, max_tokens=1, num_candidates=1)
        assert set(draw(logits.expand(5_000, 4), sampling, numbers).tolist()) == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_heads_form_without_the_rounding_of_bfloat16(dtype):
    torch.manual_seed(0)
    head = torch.nn.Linear(32, 50).to(dtype)
    hidden, form = (8.0 * torch.randn(6, 32)).to(dtype), HeadForm(scale=2.0, soft_cap=9.0)
    product = hidden.double() @ head.weight.double().T + head.bias.double()
    with torch.no_grad():
        logits = float32_logits(head, form, hidden)
    assert logits.dtype == torch.float32 and logits.abs().max() > 8.0
    torch.testing.assert_close(logits.double(), 9.0 * torch.tanh(2.0 * product / 9.0), rtol=0, atol=1e-4)
