"""A folder's files against the model in memory: heads that are tied or not, names, weights that are missing."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opsd.config.engine import EngineConfig, EngineSpec
from opsd.engines.transformers import TransformersEngine
from opsd.engines.weights import complete_weights
from opsd.errors import ConfigError
from opsd.models.student_folder import save_student
from opsd.models.weights import as_stored, check_weights, model_without_weights, names_differ, tied_names, unties_head
from opsd.types import Prompt, Rollout, Vocabulary
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3
from tiny_architectures import make_architecture

VOCABULARY = Vocabulary(size=64, stop_ids=(0,))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def folder_with(tmp_path, *, tied, head=None):
    """A tiny model whose config says `tied`; `head`: a function of its embedding, written to the file as its head."""
    path = make_tiny_qwen3(tmp_path / "model", tied=tied, layers=1, seed=3, eos_token_id=0, scale=2.0)
    make_char_tokenizer(path, eos_token_id=0)
    weights = load_file(path / "model.safetensors")
    weights.pop(HEAD, None)
    if head is not None:
        weights[HEAD] = head(weights[EMBEDDING])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def own(embedding_VD):
    return embedding_VD.flip(0).contiguous()


def as_bin(path):
    """The same weights in a pickle, as older models have them: tied weights stand in it under both names."""
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def skeleton(path):
    return model_without_weights(str(path), trust_remote_code=False)


def score(path, weights=None):
    """The transformers engine's log-probabilities [8] of one answer, after an update with `weights`."""
    config = EngineConfig(backend="transformers")
    spec = EngineSpec(path=str(path), vocabulary=VOCABULARY, config=config, device="cpu", max_model_tokens=32)
    engine = TransformersEngine(spec)
    if weights is not None:
        engine.update_weights(weights, 1)
    return engine.score([answer()], top_k=4)[0].sampled_logprobs


def answer():
    prompt = Prompt(index=0, token_ids=np.array([7, 9, 11], np.int32), text="", answer=None, source="test")
    return Rollout(
        prompt=prompt,
        sample=0,
        response_ids=np.arange(20, 28, dtype=np.int32),
        sampled_logprobs=np.zeros(8, np.float32),
        candidate_ids=np.zeros((8, 1), np.int32),
        candidate_logprobs=np.zeros((8, 1), np.float32),
        stopped=False,
        policy_version=0,
    )


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_a_head_of_its_own_stays_one_whatever_the_config_says(binary, tmp_path):
    path = folder_with(tmp_path, tied=True, head=own)
    if binary:
        as_bin(path)
    assert tied_names(skeleton(path)) == set()
    assert unties_head(str(path), skeleton(path), trust_remote_code=False)
    trained = {name: weight.clone() for name, weight in AutoModelForCausalLM.from_pretrained(path).state_dict().items()}
    trained[HEAD] = 0.5 * trained[HEAD]  # and the embedding as it was
    exported = tmp_path / "exported"
    save_student(exported, complete_weights(skeleton(path), trained), str(path), trust_remote_code=False)
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is False
    found = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in trained.items())
    after = score(path, trained)
    np.testing.assert_allclose(after, score(exported), atol=1e-6)
    assert np.abs(after - score(path)).max() > 0.1


@pytest.mark.parametrize("head", [None, torch.Tensor.clone], ids=["no head", "an equal head"])
def test_a_tied_head_stays_tied(head, tmp_path):
    path = folder_with(tmp_path, tied=True, head=head)
    assert tied_names(skeleton(path)) == {HEAD}
    assert not unties_head(str(path), skeleton(path), trust_remote_code=False)
    trained = {name: 0.5 * weight for name, weight in AutoModelForCausalLM.from_pretrained(path).state_dict().items()}
    complete = complete_weights(skeleton(path), trained)
    assert HEAD not in complete
    save_student(tmp_path / "exported", complete, str(path), trust_remote_code=False)
    assert HEAD not in load_file(tmp_path / "exported" / "model.safetensors")
    np.testing.assert_allclose(score(path, trained), score(tmp_path / "exported"), atol=1e-6)


def test_weights_that_no_file_holds_are_refused_by_name(tmp_path):
    """transformers would begin with random ones, an engine of vLLM with whatever lay in memory."""
    path = folder_with(tmp_path, tied=False)
    with pytest.raises(ConfigError, match=r"student.path=.*: its weight files lack 1 .* random: lm_head.weight$"):
        check_weights("student.path", str(path), False)
    weights = load_file(path / "model.safetensors")
    for name in [name for name in weights if "q_proj" in name or "norm" in name]:
        del weights[name]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack 7 of .* random: lm_head.weight, model.layers.0.input.*, \.\.\.$"):
        check_weights("teacher.path", str(path), False)


@pytest.mark.parametrize(("dtype", "said"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_packed_weights_without_a_word_on_how_are_refused_by_name(tmp_path, dtype, said):
    """transformers would take the packed numbers for the weights."""
    path = folder_with(tmp_path, tied=True)
    weights = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file({**weights, name: weights[name].to(dtype)}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=rf"teacher.path=.* hold {name} in {said}, and .* no quantization_config"):
        check_weights("teacher.path", str(path), False)


def test_a_folder_without_weights_is_refused(tmp_path):
    path = folder_with(tmp_path, tied=True)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="student.path=.*: there are no weights in it"):
        check_weights("student.path", str(path), False)


def test_weights_of_another_shape_are_refused_by_name(tmp_path):
    path = folder_with(tmp_path, tied=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 80}))
    said = r"teacher.path=.*: 1 weights have other shapes .*: model.embed_tokens.weight \[64, 64\], not \[80, 64\]"
    with pytest.raises(ConfigError, match=said):
        check_weights("teacher.path", str(path), False)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "GLM-4-MoE", "Gemma 3 with vision", "Qwen3.5 with vision", "Llama"])
def test_weights_go_out_as_the_files_have_them(name, tmp_path):
    """Experts one by one, a text part under its prefix, a router's correction, which is no parameter."""
    path = make_architecture(name, tmp_path / "model", seed=0)
    model, stored = skeleton(path), load_file(path / "model.safetensors")
    memory = AutoModelForCausalLM.from_pretrained(path).state_dict()
    sent = as_stored(model, complete_weights(model, memory))
    beside = {other for other in stored if name == "Qwen3.5 with vision" and "visual" in other}
    assert sent.keys() == stored.keys() - beside
    assert all(torch.equal(sent[other], stored[other]) for other in sent)
    assert names_differ(model) == (name != "Llama")
    save_student(tmp_path / "exported", complete_weights(model, memory), str(path), trust_remote_code=False)
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[other], stored[other]) for other in stored)
    assert name != "GLM-4-MoE" or any(other.endswith("e_score_correction_bias") for other in sent)
