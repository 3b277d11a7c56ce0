"""Where the sequences of a row end is worked out once, in packing, and handed to every layer's attention as it is."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

from opsd.learner.attention import packed_row
from opsd.learner.model import DistillationModel
from opsd.learner.packing import pack_whole
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Selection, Vocabulary
from tests.opsd.builders import batch_of, scored_rollouts
from tests.tiny_models import SIZES

VOCABULARY = Vocabulary(size=60, stop_ids=(0,))
LENGTHS = [5, 2, 9]
# With prompts of 2, 3 and 4 tokens; a sequence is cut after the row that predicts its last token.
ENDS = [0, 6, 10, 22]
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "llama": LlamaConfig(**SIZES),
    "a window of 4": MistralConfig(**SIZES, sliding_window=4),
}


def packed():
    everything = Selection(index_N=torch.arange(sum(LENGTHS)), weight_N=torch.ones(sum(LENGTHS)))
    return pack_whole(batch_of(scored_rollouts(LENGTHS, VOCABULARY)), everything, "teacher", VOCABULARY)


def test_packing_says_where_each_sequence_ends_and_how_long_the_longest_is():
    batch = packed()
    assert batch.cu_seq_lens.tolist() == ENDS and batch.cu_seq_lens.dtype == torch.int32
    assert batch.max_length == 12 and type(batch.max_length) is int  # a tensor would have to be waited for on a GPU


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_layers_attention_gets_what_packing_made(config):
    """The very tensor: a layer that has to find it from the positions waits for a GPU to do so."""
    model, batch, seen = AutoModelForCausalLM.from_config(config), packed(), []

    def look(module, args, kwargs):
        seen.append(kwargs)

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True)
    DistillationModel(model, reverse_kl, VOCABULARY).hidden(batch)
    assert len(seen) == config.num_hidden_layers
    for handed in seen:
        assert handed["cu_seq_lens_q"] is batch.cu_seq_lens and handed["cu_seq_lens_k"] is batch.cu_seq_lens
        assert handed["max_length_q"] == handed["max_length_k"] == 12


def test_a_trunk_is_given_no_more_than_its_forward_method_takes():
    class Trunk(torch.nn.Module):
        def forward(self, input_ids, position_ids=None, cu_seq_lens_q=None):
            return input_ids

    class Model(torch.nn.Module):
        base_model = Trunk()

    batch = packed()
    row = packed_row(Model(), batch)
    assert set(row) == {"position_ids", "cu_seq_lens_q"} and row["cu_seq_lens_q"] is batch.cu_seq_lens
