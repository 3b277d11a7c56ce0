"""What student and teacher are compared by, wherever their weights are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from opsd.models.folder import model_config, model_tokenizer, stop_ids, text_setting

FINGERPRINT_BYTES = 65536  # read at the end of each weight file: fine-tuned models differ there, and 140 GB stay unread


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What preflight must know of one model."""

    tokens: tuple[str | None, ...]  # by id, as the tokenizer knows them
    vocab_size: int  # rows of the head; more than the tokens where it is padded
    stop_ids: tuple[int, ...]  # with which the model ends an answer
    max_position_embeddings: int  # tokens of its context


def read_facts(setting: str, path: str, trust_remote_code: bool) -> ModelFacts:
    """The facts of the folder that `setting` names, as in "student.path". ConfigError where it cannot be read."""
    config = model_config(setting, path, trust_remote_code)
    return facts_of(path, config, model_tokenizer(setting, path, trust_remote_code))


def facts_of(path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> ModelFacts:
    """Raises ConfigError where the config lacks what a run must know."""
    return ModelFacts(
        tokens=tuple(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))),
        vocab_size=text_setting(path, config, "vocab_size"),
        stop_ids=tuple(stop_ids(path, config, tokenizer)),
        max_position_embeddings=text_setting(path, config, "max_position_embeddings"),
    )


def tokens_digest(tokens: tuple[str | None, ...]) -> str:
    """Equal digests: every id names the same token."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def weights_fingerprint(path: str) -> str:
    """Tells apart two folders of weights by their files' names, sizes and last bytes, without reading them whole."""
    digest = hashlib.sha256()
    files = [*Path(path).glob("*.safetensors")] or [*Path(path).glob("*.bin")]
    for file in sorted(files):
        size = file.stat().st_size
        with file.open("rb") as weights:
            weights.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(f"{file.name} {size}".encode() + weights.read())
    return digest.hexdigest()
