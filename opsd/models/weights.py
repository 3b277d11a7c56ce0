"""A folder's weights by name: what its files hold, how transformers names them in memory, and the way back.

transformers renames and fuses weights as it loads them (the experts of a mixture lie in one tensor, a multimodal
folder's text part has another prefix). Other tools know the names of the files only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from opsd.errors import ConfigError
from opsd.models.folder import as_config_error, read_object

FORMATS = ("model.safetensors", "pytorch_model.bin")  # as transformers looks for them
WEIGHT_ENDS = (
    ".index.json",
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
)  # of any format
PACKED = {"I8", "U8", "I16", "I32", "F8_E4M3", "F8_E5M2", "int8", "uint8", "int16", "int32"}  # not numbers as they are
ROWS_AT_ONCE = 8192  # of two heads that are compared


def model_without_weights(path: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The model of a folder on the meta device: its names and shapes, no memory.

    It ties its head only where the files do: a head of their own beside `tie_word_embeddings=true` is a head of its
    own, as transformers has it. Raises ConfigError where the files lack weights, which would be random,
    or hold them in other shapes.
    """
    with as_config_error(f"{path}: transformers cannot build a model of its config.json"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    stored = weight_files(path)
    if not stored or getattr(config, "quantization_config", None):  # names of other formats, or of packed numbers
        return model
    packed = next(((name, dtype) for name, dtype in _matrices(stored) if dtype in PACKED), None)
    if packed:
        raise ConfigError(
            f"{path}: its weight files hold {packed[0]} in {packed[1]}, and its config.json has no "
            "quantization_config that says how to read it"
        )
    model_class, config = type(model), model.config
    model, missing, mismatched = _load_names(model_class, config, stored)
    if mismatched:
        name, in_file, in_config = min(mismatched)
        raise ConfigError(
            f"{path}: {len(mismatched)} weights have other shapes in its files than by its config.json: {name} "
            f"{list(in_file)}, not {list(in_config)}"
        )
    if missing:
        some = ", ".join(sorted(missing)[:3])
        raise ConfigError(
            f"{path}: its weight files lack {len(missing)} of the model's weights, which would be random: {some}"
            + (", ..." if len(missing) > 3 else "")
        )
    if _has_own_head(model, stored):
        for part in {id(each): each for each in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
        model, _, _ = _load_names(model_class, config, stored)
    return model


def check_weights(setting: str, path: str, trust_remote_code: bool) -> None:
    """Raises ConfigError where there are no weight files, or where those that are here lack some of the weights."""
    if Path(path).is_dir() and not any(file.name.endswith(WEIGHT_ENDS) for file in Path(path).iterdir()):
        raise ConfigError(f"{setting}={path}: there are no weights in it: expected model.safetensors or its shards")
    try:
        model_without_weights(path, trust_remote_code=trust_remote_code)
    except ConfigError as error:
        raise ConfigError(f"{setting}={error}") from error


def unties_head(path: str, model: PreTrainedModel, *, trust_remote_code: bool) -> bool:
    """Whether `model`, from `model_without_weights`, has a head of its own against the folder's config.json."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    ties = [getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config())]
    return any(ties) and not model.config.tie_word_embeddings


def untied_settings(path: str, model: PreTrainedModel, *, trust_remote_code: bool) -> dict[str, Any]:
    """What config.json must say for a head of its own where it says the contrary; empty where it is right.

    `model`: from `model_without_weights`.
    """
    if not unties_head(path, model, trust_remote_code=trust_remote_code):
        return {}
    untied = {"tie_word_embeddings": False}
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return {**untied, "text_config": untied} if config.get_text_config() is not config else untied


def weight_files(path: str) -> dict[str, Path]:
    """The file of each weight by the name that it has there; empty where there are none that transformers reads."""
    for folder, name in ((Path(path), name) for name in FORMATS):
        index, single = folder / f"{name}.index.json", folder / name
        if single.is_file():
            with _opened(single) as (names, _):
                return dict.fromkeys(names, single)
        if index.is_file():
            return {name: folder / file for name, file in _shards(index).items()}
    return {}


def _shards(index: Path) -> dict[str, str]:
    """The name of the file in which each weight lies. Raises ConfigError where the index does not say so."""
    shards = read_object(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise ConfigError(f"{index}: weight_map must name the file of each weight")
    return shards


def as_stored(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` by the names and in the layout of the folder's files. `model`: from `model_without_weights`."""
    return revert_weight_conversion(model, weights)


def read_weight(path: str, model: PreTrainedModel, wanted: Tensor) -> Tensor | None:
    """One weight out of a folder's files, and nothing else of them; None where no file has it by a name that is known.

    `wanted`: a parameter of `model`, from `model_without_weights`, which may be tied to others.
    """
    stored = weight_files(path)
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight is wanted:
            [in_file] = as_stored(model, {name: torch.empty(0, device="meta")})
            if in_file in stored:
                with _opened(stored[in_file]) as (_, weight_of):
                    return weight_of(in_file)[...]
    return None


def stored_beside(path: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a folder's files that are none of `model`, from `model_without_weights`: a vision tower, say."""
    stored = weight_files(path)
    empty = {name: torch.empty(weight.shape, device="meta") for name, weight in model.state_dict().items()}
    own = as_stored(model, empty).keys()
    needed = as_stored(model, {name: empty[name] for name in empty.keys() - tied_names(model)}).keys()
    if not needed <= stored.keys():  # names of other formats: what else is there cannot be told apart
        return {}
    found = {}
    for file, names in _by_file({name: file for name, file in stored.items() if name not in own}).items():
        with _opened(file) as (_, weight):
            found.update({name: weight(name)[...] for name in names})
    return found


def names_differ(model: PreTrainedModel) -> bool:
    """Whether the files have other names than the model in memory. `model`: from `model_without_weights`."""
    names = model.state_dict().keys() - tied_names(model)
    return as_stored(model, {name: model.state_dict()[name] for name in names}).keys() != names


def tied_names(model: PreTrainedModel) -> set[str]:
    """The weights that are other weights of this model, as a tied `lm_head.weight`."""
    return set(model.all_tied_weights_keys)


def _load_names(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, stored: dict[str, Path]
) -> tuple[PreTrainedModel, set[str], set[tuple]]:
    """(the model as transformers makes it of weights of these names and shapes, the names that it misses,
    (name, shape in the files, shape in the model) where these differ).
    """
    state = {}
    for file, names in _by_file(stored).items():
        with _opened(file) as (_, weight):
            state.update({name: torch.empty(_shape(weight(name)), device="meta") for name in names})
    with _quiet():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map="meta",
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return model.eval(), set(info["missing_keys"]), set(info["mismatched_keys"])


def _matrices(stored: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """(name, dtype) of what has two dimensions or more."""
    for file, names in _by_file(stored).items():
        with _opened(file) as (_, weight):
            for name in names:
                one = weight(name)
                if len(_shape(one)) >= 2:
                    yield name, one.get_dtype() if hasattr(one, "get_dtype") else str(one.dtype).removeprefix("torch.")


def _has_own_head(model: PreTrainedModel, stored: dict[str, Path]) -> bool:
    """Whether a weight that the config ties to another stands in the files beside it, with other values."""
    for pair in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        names = [next(iter(as_stored(model, {name: torch.empty(0, device="meta")}))) for name in pair]
        if all(name in stored for name in names) and not _equal(*((stored[name], name) for name in names)):
            return True
    return False


def _equal(one: tuple[Path, str], other: tuple[Path, str]) -> bool:
    with _opened(one[0]) as (_, first), _opened(other[0]) as (_, second):
        pair = first(one[1]), second(other[1])
        if _shape(pair[0]) != _shape(pair[1]):
            return False
        starts = range(0, _shape(pair[0])[0], ROWS_AT_ONCE)
        return all(torch.equal(*(each[start : start + ROWS_AT_ONCE] for each in pair)) for start in starts)


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Iterable[str], Callable[[str], Any]]]:
    """(the names in it, a name's weight, which is read where it is sliced). ConfigError where it cannot be read."""
    weights: Any
    found: tuple[Iterable[str], Callable[[str], Any]]
    with ExitStack() as stack:
        with as_config_error(f"{file}: it holds no weights that can be read"):
            if file.suffix == ".safetensors":
                weights = stack.enter_context(safe_open(file, framework="pt"))
                found = weights.keys(), weights.get_slice
            else:
                weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                found = weights.keys(), weights.__getitem__
        yield found


def _shape(weight: Any) -> tuple[int, ...]:
    return tuple(weight.get_shape() if hasattr(weight, "get_shape") else weight.shape)


def _by_file(stored: dict[str, Path]) -> dict[Path, list[str]]:
    names: dict[Path, list[str]] = {}
    for name, file in stored.items():
        names.setdefault(file, []).append(name)
    return names


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of missing weights: the caller says what matters in a line of its own."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
