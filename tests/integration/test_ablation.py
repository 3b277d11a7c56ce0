"""An ablation's run in one process is the run that tip.train makes of the same settings."""

import pytest

from scripts.ablation.arms import ARMS
from scripts.ablation.in_process import config, started
from tests.integration.runs import TRANSFORMERS, arguments, finished, training_lines
from tests.opsd.process_group import leave_group

NUM_STEPS = 4


@pytest.mark.usefixtures("joined")
@pytest.mark.parametrize(
    "arm",
    [
        pytest.param("all", marks=pytest.mark.long),
        pytest.param("ier@0.2", marks=pytest.mark.long),
        pytest.param("adakd", marks=pytest.mark.slow),  # a statistic, a selection and a temperature for each token
    ],
)
def test_losses_and_selections_are_those_of_a_run_of_its_own(pair, tmp_path, arm):
    settings = [*ARMS[arm].settings, f"num_steps={NUM_STEPS}", "eval.num_kl_prompts=0", "loss.payload=logprobs"]
    lines = training_lines(finished(pair, tmp_path / arm, *TRANSFORMERS, *settings))
    own = [each for each in arguments(pair, tmp_path / "unused", *settings) if not each.startswith("output_dir=")]
    leave_group()
    with started(config(own)) as run:
        steps = [run.step(step, measure=step == 1) for step in range(NUM_STEPS)]
    assert [step.report.loss for step in steps] == pytest.approx([line["loss"] for line in lines], abs=1e-6)
    assert [step.report.num_kept for step in steps] == [line["num_kept"] for line in lines]
    norms = [line["grad_norm"] for line in lines]
    assert [step.report.grad_norm for step in steps] == pytest.approx(norms, rel=1e-5)
    cosine = steps[1].cosine
    assert cosine == pytest.approx(1.0, abs=1e-6) if arm == "all" else -1.0 < cosine < 0.999
