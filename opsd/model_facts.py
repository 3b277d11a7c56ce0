"""What a model's folder says about it without its weights: tokens, stop ids, context."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from opsd.errors import ConfigError

FINGERPRINT_BYTES = 65536  # read at the end of each weight file: fine-tuned models differ there, and 140 GB stay unread


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What student and teacher are compared by."""

    tokens: tuple[str | None, ...]  # by id, as the tokenizer knows them
    vocab_size: int  # rows of the head; more than the tokens where it is padded
    stop_ids: tuple[int, ...]  # with which the model ends an answer
    context: int  # tokens


def read_facts(role: str, path: str, trust_remote_code: bool) -> ModelFacts:
    """Raises ConfigError that names `role`.path where the folder or its tokenizer cannot be read."""
    config = read_config(role, path, trust_remote_code)
    return facts_of(path, config, read_tokenizer(role, path, trust_remote_code))


def facts_of(path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
    return ModelFacts(
        tokens=tuple(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))),
        vocab_size=config.vocab_size,
        stop_ids=tuple(_stop_ids(path, config, tokenizer)),
        context=config.max_position_embeddings,
    )


def read_config(role: str, path: str, trust_remote_code: bool) -> PreTrainedConfig:
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{role}.path={path}: there is no model here (expected a folder with a config.json)")
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def read_tokenizer(role: str, path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{role}.path={path}: cannot load its tokenizer: {error}") from error


def tokens_digest(tokens: tuple[str | None, ...]) -> str:
    """Equal digests: every id names the same token."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def weights_fingerprint(path: str) -> str:
    """Tells apart two folders of weights by their files' names, sizes and last bytes, without reading them whole."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as weights:
            weights.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(f"{file.name} {size}".encode() + weights.read())
    return digest.hexdigest()


def _stop_ids(path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which this model ends an answer: generation_config.json, else config.json, else the tokenizer."""
    generation_file = Path(path) / "generation_config.json"
    generation = json.loads(generation_file.read_text()) if generation_file.is_file() else {}
    found: Any = generation.get("eos_token_id", config.eos_token_id)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise ConfigError(
            f"{path}: no stop token: neither generation_config.json, config.json nor the tokenizer names one"
        )
    return list(found) if isinstance(found, (list, tuple)) else [found]
