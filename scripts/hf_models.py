"""Loads, thins and saves Hugging Face decoders of the Llama shape (`model.model.layers`)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_model(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in the dtype that it was saved in, and its tokenizer. Reads local files only."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The dequantised model in bfloat16, and its tokenizer with the chat template of the file."""
    source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = source.config
    del config.quantization_config  # save_pretrained would refuse a model that it takes for a quantised one
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def drop_layers(model: PreTrainedModel, every: int) -> list[int]:
    """Removes the layers with index every - 1, 2 * every - 1, ... in place; returns these indices.

    The first layer always stays; so does the last one unless their number divides by `every`.
    Raises ValueError where `every` is below 2 or nothing would be dropped.
    """
    layers = model.model.layers
    dropped = list(range(every - 1, len(layers), every)) if every >= 2 else []
    if not dropped:
        raise ValueError(f"every must be in 2..{len(layers)} for a model of {len(layers)} layers, got {every}")
    kept = [index for index in range(len(layers)) if index not in dropped]
    model.model.layers = nn.ModuleList(layers[index] for index in kept)
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]
    return dropped


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """safetensors, config, generation config and tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
