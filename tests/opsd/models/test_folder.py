"""A model's folder whose small files say something that they cannot mean is refused in one line, by the file's name."""

import json

import pytest
from transformers import AutoTokenizer

from opsd.errors import ConfigError
from opsd.models.facts import read_facts
from opsd.models.folder import model_config, model_tokenizer, stop_ids
from opsd.models.weights import check_weights
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3


@pytest.fixture
def folder(tmp_path):
    make_tiny_qwen3(tmp_path / "model", tied=True, layers=1, seed=0, eos_token_id=0)
    return make_char_tokenizer(tmp_path / "model", eos_token_id=0)


def changed(folder, name, **changes):
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changes}))


def read_all(folder):
    """All that a run reads of it before it starts anything."""
    read_facts("student.path", str(folder), False)
    check_weights("student.path", str(folder), False)


def test_the_folder_itself_is_sound(folder):
    read_all(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON (Expecting property name"),
        (b"", "not JSON (Expecting value"),
        (b"[1]", "it must hold a JSON object, got list"),
        (b"null", "it must hold a JSON object, got NoneType"),
        (b'{"eos_token_id": 0, "eos_token_id": 1}', "the key 'eos_token_id' stands twice in one object"),
        (b"\xff\xfe{}", "'utf-8' codec can't decode"),
        (b"[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(folder, name, content, said):
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_all(folder)
    assert str(refused.value).startswith(f"{folder / name}: {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "wide"}, "config.json: .*hidden_size"),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"num_hidden_layers": "two"}, "config.json: .*num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers must be at most 1,000, got 1000000000"),
        ({"text_config": {"n_layer": 1001}}, "config.json: n_layer must be at most 1,000, got 1001"),
        ({"model_type": "no_such_model"}, "config.json: .*no_such_model"),
        ({"model_type": ["qwen3"]}, "config.json: "),
        ({"vocab_size": 0}, "vocab_size in its config.json must be a whole number of at least 1, got 0"),
        ({"max_position_embeddings": -1}, "max_position_embeddings in its config.json must be a whole number of at"),
        ({"vocab_size": 64.5}, "vocab_size"),
        ({"rope_parameters": 3}, "config.json: "),
        ({"layer_types": "full"}, "config.json: "),
    ],
)
def test_a_wrong_value_of_the_config_is_one_line(folder, changes, said):
    changed(folder, "config.json", **changes)
    with pytest.raises(ConfigError, match=said) as refused:
        read_all(folder)
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("found", ["0", [0, "1"], [], {"a": 1}, True, -1, 1.5, [[0]]])
def test_stop_tokens_are_ids(folder, found):
    changed(folder, "generation_config.json", eos_token_id=found)
    config, tokenizer = model_config("student.path", str(folder), False), AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ConfigError, match="its eos_token_id must be an id or a list of ids, got "):
        stop_ids(str(folder), config, tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": 1}'),
        ("tokenizer.json", '{"model": {"type": "WordLevel", "vocab": 5}}'),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": 5}'),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_one_line(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match="^student.path=.*: cannot load its tokenizer: ") as refused:
        model_tokenizer("student.path", str(folder), False)
    assert "\n" not in str(refused.value)


def test_weights_that_cannot_be_read_are_named(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ConfigError, match="model.safetensors: it holds no weights that can be read: SafetensorError"):
        read_all(folder)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for content, said in (
        ("{", "model.safetensors.index.json: not JSON"),
        ("{}", "model.safetensors.index.json: weight_map must name the file of each weight"),
        ('{"weight_map": {"a": 5}}', "model.safetensors.index.json: weight_map must name the file of each weight"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: it holds no weights that can be read"),
    ):
        index.write_text(content)
        with pytest.raises(ConfigError, match=said):
            read_all(folder)


def test_a_models_name_may_be_of_any_length(tmp_path):
    for path in (f"{tmp_path}/{'x' * 300}", "x/" * 3000, "name/" + "x" * 300):
        with pytest.raises(ConfigError, match="there is no model here"):
            model_config("teacher.path", path, False)
