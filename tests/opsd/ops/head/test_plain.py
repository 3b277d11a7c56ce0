"""The head of models that do more, or other, than multiply by lm_head.weight."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opsd.errors import ConfigError
from opsd.ops.head.plain import head_difference, require_plain_head

SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MAMBA = dict(mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8)
RECURRENT = dict(head_dim=8, lru_width=32, block_types=["recurrent", "attention"], attention_window_size=16)


def model(kind, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def with_bias(causal_lm, size):
    with torch.no_grad():
        causal_lm.lm_head.bias.fill_(0.0)[3] = size
    return causal_lm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox", "gemma3_text"])
def test_a_plain_head_passes(kind, dtype):
    found = head_difference(model(kind, dtype))
    assert found.is_plain
    assert found.largest < 0.1 * found.tolerance


@pytest.mark.parametrize(
    ("make", "cause", "largest"),
    [
        (lambda: with_bias(model("phi"), 0.5), "a bias of lm_head", None),
        (lambda: model("falcon_h1", **MAMBA, lm_head_multiplier=0.5), "lm_head_multiplier=0.5", 25.0),
        (lambda: model("recurrent_gemma", **RECURRENT), "logits_soft_cap=30.0", 50 - 30 * 0.9311),
        (lambda: model("gemma2", head_dim=8), "final_logit_softcapping=30.0", 50 - 30 * 0.9311),
        (lambda: model("granite", logits_scaling=8.0), "logits_scaling=8.0", 43.75),
        (lambda: model("minicpm3", dim_model_base=16, num_key_value_heads=4), "dim_model_base=16", 25.0),
    ],
    ids=["phi", "falcon-h1", "recurrent-gemma", "gemma2", "granite", "minicpm3"],
)
def test_what_a_model_does_besides_is_measured_and_named(make, cause, largest):
    """Random weights: their logits are far below a soft cap. tanh(50 / 30) = 0.9311."""
    causal_lm = make()
    found = head_difference(causal_lm)
    if largest is not None:
        assert found.largest == pytest.approx(largest, rel=1e-3)
    with pytest.raises(ConfigError, match="student.path=the/folder.*beyond lm_head.weight") as error:
        require_plain_head("student.path", "the/folder", causal_lm, found)
    assert cause in str(error.value)
    assert type(causal_lm).__name__ in str(error.value)


def test_a_bias_too_small_for_bfloat16_is_found_and_a_zero_one_is_none():
    assert not head_difference(with_bias(model("phi", torch.bfloat16), 1e-4)).is_plain
    assert head_difference(with_bias(model("phi"), 0.0)).is_plain


def test_a_change_without_a_name_is_found():
    """Code of a model's own, here one that shifts a single logit."""
    causal_lm = model("llama")
    forward = causal_lm.forward

    def shifted(**inputs):
        output = forward(**inputs)
        output.logits[..., 7] += 0.1
        return output

    causal_lm.forward = shifted
    found = head_difference(causal_lm)
    with pytest.raises(ConfigError, match=r"teacher.path=x: LlamaForCausalLM .* differ by up to 0.1 where"):
        require_plain_head("teacher.path", "x", causal_lm, found)
