"""A model's sizes are the published ones, with a folder and without."""

import pytest

from opsd.errors import ConfigError
from opsd.plan.models import kept_configs, read_model
from tests.tiny_models import make_tiny_qwen3

# The parameters of the safetensors files, as the models' pages on the hub state them.
PUBLISHED = {
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-1.7B": 2_031_739_904 - 151_936 * 2048,  # its file has the head twice, though it is tied
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "outputs/smollm2-pair/teacher": 134_515_008,
}


@pytest.mark.parametrize("path", PUBLISHED)
def test_parameters_are_those_published(path):
    model = read_model("teacher", path)
    assert model.num_parameters == PUBLISHED[path]
    layers = model.num_hidden_layers * model.num_layer_parameters
    assert model.num_root_parameters == model.num_parameters - layers
    assert model.num_root_parameters == (2 - model.tied) * model.num_embedding_parameters + model.hidden_size


def test_a_cache_token_of_llama_70b():
    """80 layers x 8 heads x 128 numbers, keys and values, two bytes each."""
    assert read_model("teacher", "meta-llama/Llama-3.3-70B-Instruct").cache_bytes_a_token("bfloat16") == 327_680


def test_a_folder_needs_no_weights(tmp_path):
    folder = make_tiny_qwen3(tmp_path / "m", vocab_size=96, width=64, layers=3, tied=False, seed=0, eos_token_id=0)
    weights = folder / "model.safetensors"
    num_bytes = weights.stat().st_size
    weights.unlink()
    model = read_model("student", str(folder))
    assert 0 <= num_bytes - 4 * model.num_parameters < 8192  # float32, and the file's header
    assert (model.vocab_size, model.num_hidden_layers, model.head_dim, model.tied) == (96, 3, 32, False)
    assert model.has_head_norms


def test_an_unknown_model_is_named_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"student\.path=no/such-model: no folder with a config\.json.*Qwen/Qwen3-4B"):
        read_model("student", "no/such-model")


def test_a_model_without_an_mlp_width_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}')
    with pytest.raises(ConfigError, match=r"teacher\.path=.*: the plan needs intermediate_size in its config\.json"):
        read_model("teacher", str(tmp_path))


def test_every_kept_model_is_checked_here_or_a_recipe_makes_it():
    assert set(kept_configs()) - set(PUBLISHED) == {
        "outputs/quickstart-pair/student",
        "outputs/quickstart-pair/teacher",
        "outputs/opsd-pair/student",
        "outputs/agent-pair/student",
        "outputs/agent-pair/teacher",
        "outputs/smollm2-pair/student",
    }
