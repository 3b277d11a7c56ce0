"""More ranks, more engines and no tip: the same run."""

import pytest
import torch

from tests.integration.runs import finished, losses, training_lines, weights


def test_selector_all_equals_no_tip_and_more_workers_give_the_same_run(pair, tmp_path):
    """Bit for bit on one rank; two ranks add in another order, so a little less than that."""
    with_tip = finished(pair, tmp_path / "tip", "selector=all")
    without = finished(pair, tmp_path / "plain", program="opsd.train")
    assert losses(with_tip) == losses(without)
    a, b = weights(with_tip), weights(without)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert training_lines(without)[0]["kept_ratio"] == 1.0
    workers = finished(pair, tmp_path / "workers", "selector=all", "learner.num_workers=2", "rollout.num_workers=2")
    assert losses(workers)[0] == pytest.approx(losses(without)[0], rel=1e-5)
    assert losses(workers) == pytest.approx(losses(without), rel=2e-2)  # later rollouts may differ in a token


def test_a_ratio_that_follows_the_loss_is_resumed_and_the_same_on_two_ranks(pair, tmp_path):
    """AdaKD: the kept share of every step, which is the state of LATF made visible."""
    adakd = [
        "method=adakd", "selector.scope=batch", "+selector.schedule_options={beta: 0.3, num_warmup: 2}",
        "rollout.backend=transformers", "teacher.backend=transformers",
    ]  # fmt: skip

    def kept(folder):
        return [line["kept_ratio"] for line in training_lines(folder)]

    unbroken = finished(pair, tmp_path / "whole", *adakd)
    whole = kept(unbroken)
    assert whole[0] == 1.0 and whole[-1] < 0.95
    finished(pair, tmp_path / "parts", *adakd, "stop_at_step=4")
    parts = finished(pair, tmp_path / "parts", *adakd, "resume=auto")
    assert kept(parts) == whole
    assert losses(parts) == losses(unbroken)
    resumed, expected = weights(parts), weights(unbroken)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert kept(finished(pair, tmp_path / "ranks", *adakd, "learner.num_workers=2")) == pytest.approx(whole, abs=0.02)
