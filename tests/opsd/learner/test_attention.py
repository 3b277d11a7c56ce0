"""Attention on a packed row against the same model on each sequence alone."""
# L tokens of the packed row, D width

import copy
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from opsd.learner.attention import PACKED, VARLEN, attention_for, packed_attention, row_mask
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
DEEPSEEK = DeepseekV3Config(
    **{**SIZES, "num_key_value_heads": 4},
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    first_k_dense_replace=2,
)


def hidden_and_gradients(model, token_ids, positions, **row):
    """The last hidden states [L, D] and the gradients of a sum of them."""
    model.zero_grad()
    hidden_LD = model.model(input_ids=token_ids[None], position_ids=positions[None], use_cache=False, **row)[0][0]
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


def row_inputs(lengths):
    """What packing hands to the trunk."""
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    longest = max(lengths)
    return dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest)


def reference(query, key, value, ends, ends_k, longest, longest_k, scale, window, is_causal):
    """Attention [L, A, D] of each sequence by softmax; what torch's kernel computes, for a CPU."""
    assert ends.dtype == torch.int32 and torch.equal(ends, ends_k)
    assert isinstance(longest, int) and longest == longest_k == ends.diff().max()
    assert is_causal and query.shape[1] == key.shape[1] == value.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        seen = (back >= 0) & (back <= window[0] if window[0] >= 0 else True)
        weights = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append((weights @ v).transpose(0, 1))
    return torch.cat(parts)


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    return reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, (-1, 0), is_causal)


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    is_causal = window_size[1] == 0
    return reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, is_causal)


def varlen_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    is_causal = window_size[1] == 0
    return reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, is_causal)


def pair(name, attention):
    """A model with this attention, and the same one with transformers' own."""
    torch.manual_seed(0)
    packed = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation=attention).eval()
    alone = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval()
    alone.load_state_dict(packed.state_dict())
    return packed.double(), alone.double()


@pytest.mark.parametrize("kernel", [varlen_2_10, varlen_2_11, varlen_2_13], ids=["2.10", "2.11", "2.13"])
@pytest.mark.parametrize("name", [*CONFIGS, "deepseek, narrow values"])
def test_torchs_variable_length_attention_gives_a_packed_row_as_its_sequences(name, kernel, monkeypatch):
    """Its kernel needs CUDA: here a function with the signature of three versions of torch stands for it."""
    monkeypatch.setitem(CONFIGS, "deepseek, narrow values", DEEPSEEK)
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs.get("window_size"))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", wraps(kernel)(counted))
    packed, alone = pair(name, VARLEN)
    token_ids, positions = torch.randint(40, (sum(LENGTHS),)), torch.cat([torch.arange(n) for n in LENGTHS])
    found = hidden_and_gradients(packed, token_ids, positions, **row_inputs(LENGTHS))
    parts = zip(token_ids.split(LENGTHS), positions.split(LENGTHS), strict=True)
    expected_LDs, expected = zip(*(hidden_and_gradients(alone, *part) for part in parts), strict=True)
    torch.testing.assert_close(found[0], torch.cat(expected_LDs), **CLOSE)
    for gradient, each in zip(found[1], zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(gradient, sum(each), **CLOSE)
    has_window = "window" in name
    assert len(calls) == (0 if has_window and kernel is varlen_2_10 else 2)  # else by a mask
    assert set(calls) <= {(3, 0) if has_window else (-1, 0), None}


@pytest.mark.parametrize("attention", [PACKED, VARLEN])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layer_is_told_where_sequences_end_and_asks_for_nothing(name, attention, monkeypatch):
    """On CUDA each of these operations would stop the CPU until the GPU is done."""
    told = []
    packed, _ = pair(name, attention)
    for layer in packed.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _module, _args, given: told.append((given.get("cu_seq_lens_q"), given.get("max_length_q"))),
            with_kwargs=True,
        )
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", plain_varlen)
    row, positions = row_inputs(LENGTHS), torch.cat([torch.arange(n) for n in LENGTHS])
    inputs = dict(input_ids=torch.randint(40, (1, sum(LENGTHS))), position_ids=positions[None], use_cache=False)
    with HostReads() as reads:
        packed.model(**inputs, **row)
    assert len(told) == 2
    assert all(ends is row["cu_seq_lens_q"] and longest == 12 for ends, longest in told)
    if attention == VARLEN:
        assert reads.names == []
        for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            row.pop(key)
        with HostReads() as reads:
            packed.model(**inputs)
        assert reads.names  # a model that hands on positions alone has to ask, in every layer


def plain_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """Its shape only, without a read of its own."""
    return query.clone()


class HostReads(TorchDispatchMode):
    """The operations whose result, or whose result's size, the CPU must wait for."""

    READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::unique")

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().split(".")[0].startswith(self.READS):
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_mask_of_a_row_is_back_within_the_sequence_and_the_window(window):
    mask_LL = row_mask(sum(LENGTHS), torch.tensor([0, *LENGTHS]).cumsum(0).int(), window)[0, 0]
    blocks = [torch.ones(n, n).tril() for n in LENGTHS]
    if window is not None:
        blocks = [block.triu(1 - window) for block in blocks]
    assert torch.equal(mask_LL, torch.block_diag(*blocks).bool())


def test_a_model_that_keeps_its_positions_to_itself_gets_the_whole_row():
    """Start-up finds out that its packed rows are not its sequences."""
    query, key, value = torch.randn(3, 1, 2, 5, 8)
    found, _ = packed_attention(SimpleNamespace(), query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found, expected.transpose(1, 2))


KINDS = {
    "qwen3": CONFIGS["qwen3"],
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=2, head_dim=8),
    "bloom": BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=4),
    "gemma2": Gemma2Config(**SIZES, head_dim=8),
    "llama4": Llama4TextConfig(**SIZES, head_dim=8, attention_chunk_size=16, num_local_experts=1),
}


@pytest.mark.parametrize(
    ("name", "device", "dtype", "has_flash_attn", "expected"),
    [
        ("qwen3", "cpu", "float32", False, PACKED),
        ("qwen3", "cuda", "bfloat16", False, VARLEN),
        ("qwen3", "cuda", "bfloat16", True, "flash_attention_2"),
        ("qwen3", "cuda", "float32", True, "sdpa"),
        ("gpt_oss", "cpu", "float32", False, None),  # no sdpa
        ("gpt_oss", "cuda", "bfloat16", False, None),
        ("bloom", "cuda", "bfloat16", True, None),  # attention of its own
        ("gemma2", "cpu", "float32", False, "eager"),  # a cap on the scores
        ("gemma2", "cuda", "bfloat16", True, "flash_attention_2"),
        ("llama4", "cuda", "bfloat16", True, "sdpa"),  # chunks
    ],
)
def test_which_attention_a_student_gets(name, device, dtype, has_flash_attn, expected, monkeypatch):
    monkeypatch.setattr("opsd.learner.attention.is_flash_attn_2_available", lambda: has_flash_attn)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(copy.deepcopy(KINDS[name]))
    assert attention_for(causal_lm, device, dtype) == expected
