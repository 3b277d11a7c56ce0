"""The form of a model's head: read from its config, and measured on the model."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig

from opsd.errors import ConfigError
from opsd.models.head import head_difference, head_form, require_head
from opsd.ops.head.form import PLAIN, HeadForm
from tiny_architectures import ARCHITECTURES

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
CAPPED = 50 - 30 * 0.9311  # what a soft cap of 30 takes from a logit of 50: tanh(50 / 30) = 0.9311


def model(kind, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **settings})
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def with_bias(causal_lm, size):
    with torch.no_grad():
        causal_lm.lm_head.bias.fill_(0.0)[3] = size
    return causal_lm


MODELS = {
    "qwen3": (lambda dtype: model("qwen3", dtype), PLAIN, None),
    "gpt-neox": (lambda dtype: model("gpt_neox", dtype), PLAIN, None),
    "gemma 3": (lambda dtype: model("gemma3_text", dtype), PLAIN, None),
    "phi": (lambda dtype: with_bias(model("phi", dtype), 0.5), PLAIN, None),
    "falcon-h1": (lambda dtype: model("falcon_h1", dtype, **MAMBA, lm_head_multiplier=0.5), HeadForm(0.5), 25.0),
    "recurrent-gemma": (lambda dtype: model("recurrent_gemma", dtype, **RECURRENT), HeadForm(soft_cap=30.0), CAPPED),
    "gemma 2": (lambda dtype: model("gemma2", dtype, head_dim=8), HeadForm(soft_cap=30.0), CAPPED),
    "granite": (lambda dtype: model("granite", dtype, logits_scaling=8.0), HeadForm(1 / 8), 43.75),
    "cohere": (lambda dtype: model("cohere", dtype, logit_scale=0.25), HeadForm(0.25), 37.5),
    "minicpm 3": (
        lambda dtype: model("minicpm3", dtype, dim_model_base=16, num_key_value_heads=4), HeadForm(0.5), 25.0
    ),
    "hyperclovax": (lambda dtype: model("hyperclovax", dtype, logits_scaling=0.5), HeadForm(0.5), 25.0),
}  # fmt: skip
ALTERED = [name for name, (_, _, altered) in MODELS.items() if altered is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_form_that_the_config_says_is_the_models(name, dtype):
    make, form, _ = MODELS[name]
    causal_lm = make(dtype)
    assert head_form(causal_lm.config) == form
    found = head_difference(causal_lm, form)
    assert found.is_none
    assert found.largest < 0.5 * found.tolerance
    require_head("student.path", "the/folder", causal_lm, form, found)


@pytest.mark.parametrize("name", ALTERED)
def test_a_form_that_is_left_out_is_measured(name):
    """Random weights: their logits are far below a soft cap, which shows all the same."""
    make, _, altered = MODELS[name]
    found = head_difference(make(torch.float32), PLAIN)
    assert not found.is_none
    assert found.largest == pytest.approx(altered, rel=1e-3)


class Cubed(LlamaForCausalLM):
    """As code of a model's own, which does what no form says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits**3
        return output


def test_a_head_of_another_form_is_refused_by_name():
    torch.manual_seed(0)
    causal_lm = Cubed(AutoConfig.for_model("llama", **SIZES)).eval()
    found = head_difference(causal_lm, PLAIN)
    assert found.largest == pytest.approx(50**3 - 50, rel=1e-3)
    with pytest.raises(ConfigError, match="student.path=the/folder: Cubed makes logits of another form .*names none"):
        require_head("student.path", "the/folder", causal_lm, PLAIN, found)


def test_a_refusal_names_the_fields_that_may_be_the_cause():
    causal_lm = model("granite", logits_scaling=8.0)
    causal_lm.config.final_logit_softcapping = 30.0  # of which the model knows nothing
    form = head_form(causal_lm.config)
    found = head_difference(causal_lm, form)
    assert found.largest == pytest.approx(CAPPED, rel=1e-3)
    with pytest.raises(ConfigError, match=r"times 0.125 with a soft cap of 30, .*logits_scaling=8.0"):
        require_head("student.path", "the/folder", causal_lm, form, found)


def test_a_change_of_one_logit_is_found():
    causal_lm = model("llama")
    forward = causal_lm.forward

    def shifted(**inputs):
        output = forward(**inputs)
        output.logits[..., 7] += 0.1
        return output

    causal_lm.forward = shifted
    found = head_difference(causal_lm, PLAIN)
    with pytest.raises(ConfigError, match=r"teacher.path=x: LlamaForCausalLM .* differ by up to 0.1 where"):
        require_head("teacher.path", "x", causal_lm, PLAIN, found)


def test_logits_that_are_no_numbers_are_refused():
    causal_lm = with_bias(model("phi"), float("nan"))
    said = r"student.path=x: PhiForCausalLM has logits that are no numbers \(NaN\): "
    with pytest.raises(ConfigError, match=said + "its weight lm_head.bias holds NaN or infinity"):
        require_head("student.path", "x", causal_lm, PLAIN, head_difference(causal_lm, PLAIN))
    causal_lm = with_bias(model("phi"), 0.0)
    with torch.no_grad():
        causal_lm.lm_head.weight.fill_(3e38)
    with pytest.raises(ConfigError, match=said + "its weights are finite, but its sums overflow"):
        require_head("student.path", "x", causal_lm, PLAIN, head_difference(causal_lm, PLAIN))


def test_the_form_of_a_multimodal_model_is_its_language_models():
    config = ARCHITECTURES["Gemma 3 with vision"]()
    assert head_form(config) == PLAIN
    config.text_config.final_logit_softcapping = 30.0
    assert head_form(config) == HeadForm(soft_cap=30.0)


def test_the_field_of_a_models_own_code_is_read():
    """MiniCPM divides its hidden states by hidden_size / dim_model_base; without transformers' property."""
    assert head_form(PreTrainedConfig(hidden_size=64, dim_model_base=16)) == HeadForm(0.25)


@pytest.mark.parametrize("value", [None, 0, False, "inv_sqrt_d_model", [2.0]])
def test_a_field_without_a_number_says_nothing(value):
    config = PreTrainedConfig(hidden_size=64, logit_scale=value, final_logit_softcapping=value)
    assert head_form(config) == PLAIN
