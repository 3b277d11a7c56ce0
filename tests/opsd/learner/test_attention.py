"""Attention on a packed row against the same model on each sequence alone."""
# L tokens of the packed row, D width

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from opsd.errors import ConfigError
from opsd.learner.attention import PACKED, packed_attention
from opsd.learner.model import checkpoint_layers

SIZES = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,  # grouped queries
    max_position_embeddings=64,
    initializer_range=0.4,  # the default is so small that attention hardly counts
)
LENGTHS = [7, 1, 12, 3]
CLOSE = dict(rtol=1e-4, atol=1e-4)  # the models' norms are float32 inside
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "llama": LlamaConfig(**SIZES),
    "mistral, a window of 4": MistralConfig(**SIZES, sliding_window=4),
}


def hidden_and_gradients(model, token_ids, positions):
    """The last hidden states [L, D] and the gradients of a sum of them."""
    model.zero_grad()
    hidden_LD = model.model(input_ids=token_ids[None], position_ids=positions[None], use_cache=False)[0][0]
    (hidden_LD * torch.linspace(-1.0, 1.0, hidden_LD.shape[1], dtype=hidden_LD.dtype)).sum().backward()
    return hidden_LD.detach(), [p.grad.clone() for p in model.model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_is_its_sequences_one_by_one(name, checkpointing):
    torch.manual_seed(0)
    packed = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=PACKED).eval().double()
    alone = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval().double()
    alone.load_state_dict(packed.state_dict())
    if checkpointing:
        checkpoint_layers(packed)
    token_ids, positions = torch.randint(40, (sum(LENGTHS),)), torch.cat([torch.arange(n) for n in LENGTHS])
    hidden_LD, gradients = hidden_and_gradients(packed, token_ids, positions)
    parts = zip(token_ids.split(LENGTHS), positions.split(LENGTHS), strict=True)
    expected_LDs, expected_gradients = zip(*(hidden_and_gradients(alone, *part) for part in parts), strict=True)
    torch.testing.assert_close(hidden_LD, torch.cat(expected_LDs), **CLOSE)
    for found, each in zip(gradients, zip(*expected_gradients, strict=True), strict=True):
        torch.testing.assert_close(found, sum(each), **CLOSE)


def test_a_model_that_keeps_its_positions_to_itself_is_refused():
    query = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ConfigError, match="SimpleNamespace gets no position_ids"):
        packed_attention(SimpleNamespace(), query, query, query, None)
