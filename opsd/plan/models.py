"""What the plan must know of a model, from its config.json or from the sizes kept in opsd/conf/model.

transformers builds the model on the meta device, so a count of parameters is that of the model itself. No weights are
read and nothing is asked of a network.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from opsd.config.engine import TeacherConfig
from opsd.config.lora import LoraConfig
from opsd.config.run import StudentConfig
from opsd.errors import ConfigError
from opsd.learner.model import decoder_layers
from opsd.models.facts import ModelFacts, read_facts
from opsd.models.folder import model_config
from opsd.models.lora import add_adapter
from opsd.models.weights import model_without_weights, tied_names

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
BYTES = {"float32": 4, "bfloat16": 2}
SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A decoder's dimensions, under the names of its config.json, and its parameters."""

    path: str
    num_parameters: int  # a tied head is counted once
    num_layer_parameters: int  # of one decoder layer
    vocab_size: int  # rows of the embedding, padding included
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    has_head_norms: bool  # queries and keys are normalised, as in Qwen3
    tied: bool
    num_adapter_parameters: int = 0  # of student.lora; 0: the model itself trains

    @property
    def num_root_parameters(self) -> int:
        """Outside the decoder layers: the embedding, the head, the last norm."""
        return self.num_parameters - self.num_hidden_layers * self.num_layer_parameters

    @property
    def num_embedding_parameters(self) -> int:
        """The parameters of the embedding, and of the head alike."""
        return self.vocab_size * self.hidden_size

    def cache_bytes_a_token(self, dtype: str) -> int:
        """Keys and values of all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * BYTES[dtype]


def read_model(role: str, path: str, *, trust_remote_code: bool = False, lora: LoraConfig | None = None) -> ModelSizes:
    """The sizes of the model at `path`, a folder or a name in opsd/conf/model. Raises ConfigError that names the role.

    `role`: the section of the config, such as student or teacher. `lora`: the student's.
    """
    config = _folder_config(f"{role}.path", path, trust_remote_code) or _kept_config(path)
    if config is None:
        raise ConfigError(
            f"{role}.path={path}: no folder with a config.json, and its sizes are not kept here; known without a "
            f"folder: {', '.join(sorted(kept_configs()))}"
        )
    shape = config.get_text_config()
    missing = [name for name in SHAPE_FIELDS if not getattr(shape, name, None)]
    if missing:
        raise ConfigError(f"{role}.path={path}: the plan needs {', '.join(missing)} in its config.json")
    return _sizes(path, config, shape, trust_remote_code, lora or LoraConfig())


def tokenizer_facts(setting: str, cfg: StudentConfig | TeacherConfig) -> ModelFacts | None:
    """What tells tokenizers apart; None for a model whose folder, or a tokenizer in it, is not here."""
    if not any(os.path.isfile(Path(cfg.path) / name) for name in TOKENIZER_FILES):
        return None
    return read_facts(f"{setting}.path", cfg.path, cfg.trust_remote_code)


def kept_configs() -> dict[str, dict[str, Any]]:
    """What opsd/conf/model holds: a model's name on the hub, or the folder that a recipe makes -> its config."""
    return {path: entry["config"] for entry in _kept_entries() for path in entry["paths"]}


def kept_tokenizer(path: str) -> str | None:
    """The name of a kept model's tokenizer: models share ids where it is one name. None: it is not known."""
    return next((entry.get("tokenizer") for entry in _kept_entries() if path in entry["paths"]), None)


@cache
def _kept_entries() -> list[dict[str, Any]]:
    entries: list[Any] = [
        OmegaConf.to_container(OmegaConf.create(file.read_text())) for file in (files("opsd.conf") / "model").iterdir()
    ]
    return entries


def _folder_config(setting: str, path: str, trust_remote_code: bool) -> PreTrainedConfig | None:
    if not os.path.isfile(Path(path) / "config.json"):
        return None
    return model_config(setting, path, trust_remote_code)


def _kept_config(path: str) -> PreTrainedConfig | None:
    fields = kept_configs().get(path)
    return None if fields is None else AutoConfig.for_model(**fields)


def _sizes(
    path: str, config: PreTrainedConfig, shape: PreTrainedConfig, trust_remote_code: bool, lora: LoraConfig
) -> ModelSizes:
    if os.path.isfile(Path(path) / "config.json"):
        model = model_without_weights(path, trust_remote_code=trust_remote_code)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    heads = shape.num_attention_heads
    names = [name for name, _ in model.named_parameters()]
    sizes = ModelSizes(
        path=path,
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)),
        **{name: getattr(shape, name) for name in SHAPE_FIELDS},
        num_key_value_heads=getattr(shape, "num_key_value_heads", None) or heads,
        head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
        has_head_norms=any(name.endswith("q_norm.weight") for name in names),
        tied=bool(tied_names(model)),
    )
    return replace(sizes, num_adapter_parameters=add_adapter(model, lora).num_trained) if lora.rank else sizes
