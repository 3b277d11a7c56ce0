"""The draw of a token: its distribution, and what top_k and top_p leave of it."""

import torch

from opsd.engines.logits import draw, uniforms
from opsd.engines.sampling import Sampling


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
