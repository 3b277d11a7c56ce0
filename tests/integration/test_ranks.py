"""More ranks, more engines and no tip: the same run."""

import shutil

import pytest
import torch

from tests.integration.runs import NUM_STEPS, TRANSFORMERS, finished, losses, training_lines, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
LATF = "+selector.schedule_options={beta: 0.3, num_warmup: 2}"
ADAKD = ("method=adakd", "selector.scope=batch", LATF, *TRANSFORMERS)


def test_selector_all_equals_no_tip_bit_for_bit(pair, tmp_path):
    with_tip = finished(pair, tmp_path / "tip", "selector=all", *TRANSFORMERS)
    without = finished(pair, tmp_path / "plain", *TRANSFORMERS, program="opsd.train")
    assert losses(with_tip) == losses(without)
    a, b = weights(with_tip), weights(without)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert training_lines(without)[0]["kept_ratio"] == 1.0


@pytest.mark.long  # the golden run "ranks" has two of everything
def test_more_workers_give_the_same_run(pair, tmp_path):
    """Two ranks add in another order, so not to the last bit."""
    without = finished(pair, tmp_path / "plain", *TRANSFORMERS, program="opsd.train")
    more = ["learner.num_workers=2", "rollout.num_workers=2"]
    workers = finished(pair, tmp_path / "workers", "selector=all", *TRANSFORMERS, *more)
    assert losses(workers)[0] == pytest.approx(losses(without)[0], rel=1e-5)
    assert losses(workers) == pytest.approx(losses(without), rel=2e-2)  # later rollouts may differ in a token


def kept(folder):
    """The kept share of every step: the state of LATF made visible."""
    return [line["kept_ratio"] for line in training_lines(folder)]


def test_a_ratio_that_follows_the_loss_is_resumed(pair, tmp_path):
    """The resumed run is the unbroken one as it was when its fourth step had been saved."""
    unbroken = finished(pair, tmp_path / "whole", *ADAKD, "checkpoint.every=4")
    whole = kept(unbroken)
    assert whole[0] == 1.0 and whole[-1] < 0.95
    shutil.copytree(unbroken, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / f"step_{NUM_STEPS:06d}")
    parts = finished(pair, tmp_path / "parts", *ADAKD, "resume=auto")
    assert (parts / "metrics.replaced_1.jsonl").exists()  # the lines of steps that were taken again
    assert kept(parts) == whole
    assert losses(parts) == losses(unbroken)
    resumed, expected = weights(parts), weights(unbroken)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.long
def test_a_ratio_that_follows_the_loss_is_the_same_on_two_ranks(pair, tmp_path):
    whole = kept(finished(pair, tmp_path / "whole", *ADAKD))
    assert kept(finished(pair, tmp_path / "ranks", *ADAKD, "learner.num_workers=2")) == pytest.approx(whole, abs=0.02)
