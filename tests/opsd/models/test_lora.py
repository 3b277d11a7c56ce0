"""Which layers get an adapter, how many parameters that is, and what is no layer for one."""

import json

import pytest
import torch

from opsd.config.lora import LoraConfig
from opsd.config.run import StudentConfig
from opsd.errors import ConfigError
from opsd.models.card import adapter
from opsd.models.lora import adapter_of, merge_adapter, save_adapter
from opsd.plan.models import read_model
from tests.tiny_models import make_tiny_qwen3
from tiny_architectures import make_architecture

WIDTH, HEADS, LAYERS = 64, 2 * 32, 2  # what make_tiny_qwen3 makes; an MLP of 2 * WIDTH


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str(make_tiny_qwen3(folder, tied=request.param, layers=LAYERS, seed=0, eos_token_id=0))


def size_of(path, *targets):
    return adapter_of(StudentConfig(path=path, lora=LoraConfig(rank=3, targets=list(targets))))


def test_every_linear_layer_but_the_head_has_one(path):
    assert adapter_of(StudentConfig(path=path)) is None
    attention, mlp = 4 * (WIDTH + HEADS), 3 * (WIDTH + 2 * WIDTH)
    found = size_of(path)
    assert (found.num_layers, found.num_trained) == (LAYERS * 7, 3 * LAYERS * (attention + mlp))
    assert found.num_parameters == read_model("student", path).num_parameters
    assert read_model("student", path, lora=LoraConfig(rank=3)).num_adapter_parameters == found.num_trained


def test_targets_are_names_or_the_ends_of_names(path):
    assert size_of(path, "q_proj", "up_proj").num_layers == 2 * LAYERS
    assert size_of(path, "layers.1.mlp.up_proj", "up_proj").num_layers == LAYERS
    assert str(size_of(path, "q_proj")).startswith("768 parameters beside 2 linear layers train (")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("proj", "Qwen3ForCausalLM has no layer 'proj'; its linear layers: down_proj, gate_proj, k_proj, o_proj, q_pr"),
        ("lm_head", "'lm_head' names lm_head, the head: only linear layers can be"),
        ("embed_tokens", "'embed_tokens' names model.embed_tokens, of the kind Embedding: only linear layers can be"),
        ("mlp", "'mlp' names model.layers.0.mlp, of the kind Qwen3MLP: only linear layers can be"),
    ],
)
def test_what_is_no_layer_for_an_adapter_is_named(path, target, said):
    with pytest.raises(ConfigError, match=f"student.lora.targets: {said}"):
        size_of(path, "q_proj", target)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GPT-2", "student.lora: the decoder of GPT2LMHeadModel has no linear layers"),
        ("Falcon-H1", "FalconH1ForCausalLM: .*Module 'out_proj' is incompatible .*: name other layers by student"),
        ("GLM-4-MoE", "Glm4MoeForCausalLM: peft adapts 20 weights in place of the two factors of each of 14 "),
    ],
)  # fmt: skip
def test_a_model_whose_layers_cannot_have_one_is_refused_before_it_is_loaded(name, said, tmp_path):
    folder = str(make_architecture(name, tmp_path, seed=0))
    with pytest.raises(ConfigError, match=said):
        size_of(folder)
    if name == "GLM-4-MoE":
        assert size_of(folder, "q_proj", "o_proj").num_layers == 4


def test_a_merged_weight_is_the_base_and_the_scaled_product():
    base = {"a.weight": torch.ones(3, 2, dtype=torch.bfloat16), "a.bias": torch.ones(3)}
    factors = {"a.lora_A.default.weight": torch.ones(1, 2), "a.lora_B.default.weight": torch.tensor([[1.0], [0], [2]])}
    found = merge_adapter(base, factors, 0.25)
    assert found["a.weight"].tolist() == [[1.25, 1.25], [1, 1], [1.5, 1.5]]
    assert found["a.bias"] is base["a.bias"]


def test_the_adapters_config_names_the_base_and_not_where_it_lay(tmp_path):
    factors = {"a.lora_A.default.weight": torch.ones(1, 2), "a.lora_B.default.weight": torch.ones(3, 1)}
    save_adapter(tmp_path, factors, LoraConfig(rank=1, alpha=4.0), "/home/me/models/base-model")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (1, 4.0, ["a"])
    assert config["base_model_name_or_path"] == "base-model"


def test_the_model_card_says_what_trained():
    assert adapter({}) == adapter({"rank": 0}) == []
    [(_, said)] = adapter({"rank": 16, "alpha": 32.0, "targets": []})
    assert said == "a LoRA adapter of rank 16, alpha 32, beside every linear layer; merged"
