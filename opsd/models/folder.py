"""What a Hugging Face folder says of its model without its weights being read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from opsd.errors import ConfigError
from opsd.strict_json import JsonError, read_json

LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")  # as the kinds of models name it
MOST_LAYERS = 1000
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_config(setting: str, path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of the folder that `setting` names, as in "student.path". Raises ConfigError where there is none."""
    file = Path(path) / "config.json"
    if not os.path.isfile(file):  # not Path.is_file, which raises OSError for a name that is too long
        raise ConfigError(
            f"{setting}={path}: there is no model here (expected a folder with a config.json){download(setting, path)}"
        )
    _refuse_many_layers(file, read_object(file))
    with as_config_error(f"{setting}={path}: transformers cannot read its config.json"):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _refuse_many_layers(file: Path, config: dict[str, Any]) -> None:
    """A number too many of digits would be built layer by layer, for hours, before anything is compared with it."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in LAYER_COUNTS:
            if isinstance(part.get(name), int) and part[name] > MOST_LAYERS:
                raise ConfigError(f"{file}: {name} must be at most {MOST_LAYERS:,}, got {part[name]}")


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file of a model's folder holds. Raises ConfigError where it is no JSON object."""
    try:
        value = read_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, JsonError) as error:
        raise ConfigError(f"{file}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: it must hold a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def as_config_error(what: str) -> Iterator[None]:
    """A library that reads a model's folder fails in any way to which a wrong value leads it (a TypeError, a division
    by zero, a bare Exception of Rust code): the folder is at fault, so all of them are one ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{what}: {type(error).__name__}: {error}") from error


def text_setting(path: str, config: PreTrainedConfig, name: str) -> int:
    """A count of the language model's config, which may lie within a multimodal one. Raises ConfigError for none."""
    found = getattr(config.get_text_config(), name, None)
    if found is None:
        raise ConfigError(f"{path}: its config.json does not say {name}")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ConfigError(f"{path}: {name} in its config.json must be a whole number of at least 1, got {found!r}")
    return found


def download(setting: str, path: str) -> str:
    """What to do where a model's name on the hub was given for a folder: a run loads nothing from a network."""
    if not HUB_NAME.fullmatch(path) or os.path.exists(path):
        return ""
    folder = f"models/{path.partition('/')[2]}"
    return f". To have the hub's model of this name: hf download {path} --local-dir {folder}, then {setting}={folder}"


def model_tokenizer(setting: str, path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Raises ConfigError where it cannot be loaded."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if os.path.isfile(Path(path) / name):
            read_object(Path(path) / name)
    with as_config_error(f"{setting}={path}: cannot load its tokenizer"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def stop_ids(path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which this model ends an answer: generation_config.json, else config.json, else the tokenizer."""
    generation_file = Path(path) / "generation_config.json"
    generation = read_object(generation_file) if os.path.isfile(generation_file) else {}
    own = getattr(config, "eos_token_id", None)  # a multimodal config may have it here or in its text part
    found: Any = generation.get("eos_token_id", config.get_text_config().eos_token_id if own is None else own)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise ConfigError(
            f"{path}: no stop token: neither generation_config.json, config.json nor the tokenizer names one"
        )
    ids = list(found) if isinstance(found, (list, tuple)) else [found]
    if not ids or not all(isinstance(index, int) and not isinstance(index, bool) and index >= 0 for index in ids):
        raise ConfigError(f"{path}: its eos_token_id must be an id or a list of ids, got {found!r}")
    return ids


def weight_bytes(setting: str, path: str) -> int:
    """Bytes of the weight files on disk. Raises ConfigError where there are none."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in Path(path).glob(pattern)]
    if not files:
        raise ConfigError(f"{setting}={path}: there are no weights here (expected *.safetensors)")
    return sum(file.stat().st_size for file in files)
