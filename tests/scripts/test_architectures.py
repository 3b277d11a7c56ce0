"""Three real steps of many architectures: right to 1e-4, or refused in one line. docs/models.md is the whole table."""

import pytest

import architectures
from tiny_architectures import ARCHITECTURES

REFUSED = {
    "Phi": "a bias of lm_head",
    "Gemma 2": "final_logit_softcapping",
    "Granite": "logits_scaling",
    "Falcon-H1": "lm_head_multiplier",
}


def check(trial):
    refusal = REFUSED.get(trial.architecture)
    if refusal is None:
        assert trial.refusal is None and trial.passed, trial
    else:
        assert refusal in trial.refusal and "\n" not in trial.refusal


@pytest.mark.parametrize("name", ["GLM-4-MoE", "Gemma 3 with vision", "GPT-OSS", "Phi"])
def test_a_step_of_the_odd_ones(name):
    check(architectures.trial(name, "transformers", num_steps=1))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_three_steps(name, backend):
    check(architectures.trial_apart(name, backend))
