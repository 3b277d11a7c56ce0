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
    source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    config = source.config
    del config.quantization_config  # save_pretrained would refuse a model that it takes for a quantised one
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def drop_layers(model: PreTrainedModel, dropped: list[int]) -> None:
    """Removes the layers with these indices in place. Raises ValueError where an index is wrong or no layer is left."""
    layers = model.model.layers
    wrong = sorted(index for index in set(dropped) if not 0 <= index < len(layers))
    kept = [index for index in range(len(layers)) if index not in dropped]
    if wrong or not kept or len(kept) == len(layers):
        raise ValueError(f"the layers to drop must be some, not all, of 0..{len(layers) - 1}, got {dropped}")
    model.model.layers = nn.ModuleList(layers[index] for index in kept)
    config = model.config
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in kept]


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """safetensors, config, generation config and tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
