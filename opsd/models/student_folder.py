"""The trained student as a Hugging Face folder: its source's files as they are, with the trained weights.

Nothing but config.json is written anew, and of that only what the weights decide: whatever else a folder holds, older
tools read what comes out as they read the source, and no validation of a file that training never used can fail here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from opsd.models.weights import as_stored, model_without_weights, stored_beside, unties_head

# Of the source's files: weights in whatever format, and its model card, which is not the student's.
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".ot")
INDEX_END = ".index.json"
CARD = "README.md"
DTYPE_FIELDS = ("dtype", "torch_dtype")  # transformers 5 writes the first, older ones the second


def save_student(
    folder: Path, weights: dict[str, Tensor], source: str, *, trust_remote_code: bool, dtype: torch.dtype | None = None
) -> None:
    """Write it. `weights`: by the names in memory, without tied ones; buffers keep their own dtype.

    `dtype`: of the weights; None: the source's.
    """
    model = model_without_weights(source, trust_remote_code=trust_remote_code)
    dtype = dtype or AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).dtype or torch.float32
    unties = unties_head(source, model, trust_remote_code=trust_remote_code)
    folder.mkdir(parents=True, exist_ok=True)
    _copy_files(Path(source), folder)
    _write_config(Path(source), folder, dtype, unties)
    save_torch_state_dict(_stored(model, weights, source, dtype), folder)
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors writes files that only their owner may read


def _stored(model: PreTrainedModel, weights: dict[str, Tensor], source: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as the source's files have them, and what these hold beside (a vision tower, a draft head)."""
    buffers = dict(model.named_buffers())
    # Copies: a weight that ranks share unevenly comes as a view of a padded one, which safetensors refuses.
    cast = {
        name: weight.to("cpu", weight.dtype if name in buffers else dtype, copy=True)
        for name, weight in weights.items()
    }
    trained = {name: _whole(weight) for name, weight in as_stored(model, cast).items()}
    return {**stored_beside(source, model), **trained}


def _whole(weight: Tensor) -> Tensor:
    """A copy in memory of its own: safetensors refuses a part of another tensor, as one of fused experts is."""
    alone = weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
    return weight if alone else weight.clone(memory_format=torch.contiguous_format)


def _copy_files(source: Path, folder: Path) -> None:
    """Tokenizer, chat templates, generation config, a model's own code, the licence: each file as it is."""
    for file in sorted(source.iterdir()):
        left = file.name.startswith(".") or file.name == CARD or file.name.endswith((*NOT_COPIED, INDEX_END))
        if file.is_file() and not left:
            shutil.copyfile(file, folder / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)


def _write_config(source: Path, folder: Path, dtype: torch.dtype, unties_head: bool) -> None:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)  # these weights are not packed
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        if unties_head and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        part.update({name: str(dtype).removeprefix("torch.") for name in DTYPE_FIELDS if name in part})
    if not any(name in config for name in DTYPE_FIELDS):
        config[DTYPE_FIELDS[1]] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
