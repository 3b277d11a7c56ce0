"""What bench_support.py and bench_variance.py compare, on models that are made on the spot. Nothing is timed here."""

import argparse

import pytest
import torch

from bench_setup import load_setup
from bench_support import known, redrawn, sparse_gradients
from bench_variance import rows_of
from gradient_variance import noise_of
from opsd.config.engine import RolloutConfig
from support_truth import dense_truth, make_scored
from tests.tiny_models import make_tiny_pair

TOP_K, NUM_DRAWS = 4, 32


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """(rollouts with scores, the dense side, the vocabulary) of a student that is far from its teacher."""
    pair = make_tiny_pair(tmp_path_factory.mktemp("pair"))
    args = argparse.Namespace(
        pair=str(pair), prompts=str(pair / "prompts.jsonl"), student="", prompt_key="prompt", chat_template=False,
        device="cpu",
    )  # fmt: skip
    rollout = RolloutConfig(backend="transformers", max_response_tokens=8, num_candidates=TOP_K)
    cfg, setup = load_setup(args, rollout, teacher_top_k=TOP_K)
    scored = make_scored(cfg, setup, 4)
    return scored, dense_truth(cfg, [item.rollout for item in scored], setup.vocabulary, "cpu"), setup.vocabulary


def errors(gradients, dense):
    _, grad_hidden_TD, grad_weight_VD = gradients
    pairs = ((grad_hidden_TD, dense.grad_hidden_TD), (grad_weight_VD, dense.grad_weight_VD))
    return torch.stack([(found.double() - exact).norm() / exact.norm() for found, exact in pairs])


def test_the_mean_over_draws_comes_near_the_dense_gradient(truth):
    """A coarse one does not. With 32 draws the error of one falls to its 32nd part's root, 0.18."""
    scored, dense, vocabulary = truth
    draws = redrawn([known(item, TOP_K, TOP_K) for item in scored], dense, vocabulary, NUM_DRAWS)
    found = [sparse_gradients(items, "union", dense, vocabulary, residual=True) for items in draws]
    alone = torch.stack([errors(gradients, dense) for gradients in found]).square().mean(0).sqrt()
    together = errors([sum(parts) / NUM_DRAWS for parts in zip(*found, strict=True)], dense)
    assert (0.1 * alone < together).all() and (together < 0.3 * alone).all()
    coarse = [errors(sparse_gradients(items, "union", dense, vocabulary), dense) for items in draws[:8]]
    assert (torch.stack(coarse).mean(0) > 0.2).all()


def test_the_noise_in_closed_form_is_that_of_the_draws(truth):
    """Of the mean loss's gradient, so each row's trace counts over the square of their number."""
    scored, dense, vocabulary = truth
    items = [known(item, TOP_K, TOP_K) for item in scored]
    num_rows = len(dense.hidden_TD)
    expected = sum(noise_of(row)["residual"].trace for row in rows_of(items, "union", dense, vocabulary)) / num_rows**2
    draws = redrawn(items, dense, vocabulary, 256)
    gradients = [sparse_gradients(drawn, "union", dense, vocabulary, residual=True)[1] for drawn in draws]
    found = (torch.stack(gradients).double() - dense.grad_hidden_TD).square().sum((1, 2)).mean()
    assert found.item() == pytest.approx(expected, rel=0.15)
