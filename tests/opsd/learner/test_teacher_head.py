"""The teacher's head alone out of its folder, and whether hidden states through it are what the teacher said."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opsd.errors import ConfigError
from opsd.learner.packing import MicroBatch
from opsd.learner.teacher_head import load_teacher_head
from opsd.types import Vocabulary
from tests.tiny_models import make_tiny_qwen3

VOCABULARY = Vocabulary(size=60, stop_ids=(2, 9))
CPU = torch.device("cpu")
HERE = {"trust_remote_code": False, "device": CPU, "dtype": "float32"}


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_one_of_the_model(tmp_path, tied):
    path = make_tiny_qwen3(tmp_path, tied=tied, seed=1, eos_token_id=0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(load_teacher_head(str(path), **HERE).weight_VE, model.get_output_embeddings().weight)


def test_a_head_of_its_own_counts_though_the_config_ties_it(tmp_path):
    path = make_tiny_qwen3(tmp_path, tied=False, seed=1, eos_token_id=0)
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    weights = load_file(path / "model.safetensors")
    found = load_teacher_head(str(path), **HERE).weight_VE
    assert torch.equal(found, weights["lm_head.weight"])
    assert not torch.equal(found, weights["model.embed_tokens.weight"])


def batch_of(path, ids) -> MicroBatch:
    """What an engine would send of a sequence of these ids: its rows, and what it says of each next token."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden_LD = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        logprobs_LV = model.lm_head(hidden_LD)[:, : VOCABULARY.size].log_softmax(1)
    merged_L = logprobs_LV[:, [2, 9]].logsumexp(1)
    event_N = torch.tensor([2 if token in (2, 9) else token for token in ids[1:]])
    rows_N = torch.arange(len(event_N))
    sampled_N = torch.where(event_N == 2, merged_L[:-1], logprobs_LV[rows_N, event_N])
    zeros_N = torch.zeros(len(event_N))
    return MicroBatch(
        token_ids_L=torch.tensor(ids),
        position_L=torch.arange(len(ids)),
        cu_seq_lens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_length=len(ids),
        row_N=rows_N,
        support_NU=event_N[:, None],
        teacher_logprobs_NB=torch.stack([sampled_N, zeros_N], dim=1),
        weight_N=zeros_N,
        index_N=rows_N,
        teacher_hidden_NE=hidden_LD[:-1],
    )


def test_states_of_the_same_model_pass_and_others_are_refused(tmp_path):
    path = make_tiny_qwen3(tmp_path / "one", tied=False, seed=1, eos_token_id=0, scale=2.0)
    batch = batch_of(path, [5, 7, 9, 2, 30])
    head = load_teacher_head(str(path), **HERE)
    head.require_scores(batch, VOCABULARY)
    head.require_scores(
        replace(batch, row_N=batch.row_N[:0], teacher_hidden_NE=batch.teacher_hidden_NE[:0]), VOCABULARY
    )
    other = make_tiny_qwen3(tmp_path / "other", tied=False, seed=2, eos_token_id=0, scale=2.0)
    for wrong in (load_teacher_head(str(other), **HERE), replace(head, weight_VE=2 * head.weight_VE)):
        with pytest.raises(ConfigError, match=r"^loss\.payload=hidden: .* lm_head of .* differ by up to"):
            wrong.require_scores(batch, VOCABULARY)
    with pytest.raises(ConfigError, match="differ by up to nan"):
        head.require_scores(replace(batch, teacher_hidden_NE=batch.teacher_hidden_NE * torch.nan), VOCABULARY)


def test_a_folder_without_such_a_file_is_refused(tmp_path):
    path = make_tiny_qwen3(tmp_path, tied=False, seed=1, eos_token_id=0)
    weights = load_file(path / "model.safetensors")
    save_file({f"other.{name}": weight for name, weight in weights.items()}, path / "model.safetensors")
    with pytest.raises(ConfigError):
        load_teacher_head(str(path), **HERE)
