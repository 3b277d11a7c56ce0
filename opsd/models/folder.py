"""What a Hugging Face folder says of its model without its weights being read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from opsd.errors import ConfigError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_config(setting: str, path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of the folder that `setting` names, as in "student.path". Raises ConfigError where there is none."""
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"{setting}={path}: there is no model here (expected a folder with a config.json){download(setting, path)}"
        )
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def text_setting(path: str, config: PreTrainedConfig, name: str) -> Any:
    """A number of the language model's config, which may lie within a multimodal one. Raises ConfigError for none."""
    found = getattr(config.get_text_config(), name, None)
    if found is None:
        raise ConfigError(f"{path}: its config.json does not say {name}")
    return found


def download(setting: str, path: str) -> str:
    """What to do where a model's name on the hub was given for a folder: a run loads nothing from a network."""
    if not HUB_NAME.fullmatch(path) or Path(path).exists():
        return ""
    folder = f"models/{path.partition('/')[2]}"
    return f". To have the hub's model of this name: hf download {path} --local-dir {folder}, then {setting}={folder}"


def model_tokenizer(setting: str, path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Raises ConfigError where it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}={path}: cannot load its tokenizer: {error}") from error


def stop_ids(path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which this model ends an answer: generation_config.json, else config.json, else the tokenizer."""
    generation_file = Path(path) / "generation_config.json"
    try:
        generation = json.loads(generation_file.read_text()) if generation_file.is_file() else {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{generation_file}: not JSON: {error}") from error
    own = getattr(config, "eos_token_id", None)  # a multimodal config may have it here or in its text part
    found: Any = generation.get("eos_token_id", config.get_text_config().eos_token_id if own is None else own)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise ConfigError(
            f"{path}: no stop token: neither generation_config.json, config.json nor the tokenizer names one"
        )
    return list(found) if isinstance(found, (list, tuple)) else [found]


def weight_bytes(setting: str, path: str) -> int:
    """Bytes of the weight files on disk. Raises ConfigError where there are none."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in Path(path).glob(pattern)]
    if not files:
        raise ConfigError(f"{setting}={path}: there are no weights here (expected *.safetensors)")
    return sum(file.stat().st_size for file in files)
