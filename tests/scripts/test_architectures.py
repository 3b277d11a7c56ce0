"""Three real steps of many architectures, right to 1e-4. docs/models.md is the whole table."""

import pytest

import architectures
from tiny_architectures import ARCHITECTURES


def check(trial):
    assert trial.refusal is None and trial.passed, trial


@pytest.mark.parametrize("name", ["GLM-4-MoE", "Gemma 3 with vision", "GPT-OSS", "Phi", "Gemma 2", "Cohere"])
def test_a_step_of_the_odd_ones(name):
    check(architectures.trial(name, "transformers", num_steps=1))


@pytest.mark.slow
def test_a_vllm_engine_of_a_mixture_of_experts_follows_the_learner():
    """vLLM's CPU build packs the experts, and forgot it when it got new weights."""
    check(architectures.trial_apart("Qwen3-MoE", "vllm"))


@pytest.mark.long
@pytest.mark.parametrize("backend", ["transformers", "vllm"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_three_steps(name, backend):
    check(architectures.trial_apart(name, backend))
