"""Saving and loading the learner's state, and writing the student as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from opsd.errors import DataError
from opsd.learner.loading import empty_student
from opsd.learner.mean import WeightMean
from opsd.learner.model import DistillationModel


def save_learner(
    folder: Path,
    model: DistillationModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    mean: WeightMean | None,
) -> None:
    """Weights, optimiser and `mean` as a torch checkpoint that any number of ranks can load; each rank's RNG beside."""
    dcp.save(_sharded_state(model, optimizer, mean), checkpoint_id=str(folder))
    rank_state = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        rank_state["cuda_rng"] = torch.cuda.get_rng_state()
    save_file(rank_state, _rank_file(folder, dist.get_rank()), metadata={"scheduler": json.dumps(_plain(scheduler))})


def load_learner(
    folder: Path,
    model: DistillationModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    mean: WeightMean | None,
) -> None:
    """The inverse of save_learner. Raises DataError where the checkpoint is incomplete."""
    first = _rank_file(folder, 0)
    if not first.is_file():
        raise DataError(f"{folder}: not a learner checkpoint ({first.name} is missing)")
    state = _sharded_state(model, optimizer, mean)
    dcp.load(state, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    own = _rank_file(folder, dist.get_rank())
    with safe_open(own if own.is_file() else first, framework="pt") as file:
        torch.set_rng_state(file.get_tensor("rng"))
        if torch.cuda.is_available() and "cuda_rng" in file.keys():  # noqa: SIM118  (safe_open is no mapping)
            torch.cuda.set_rng_state(file.get_tensor("cuda_rng"))
        scheduler.load_state_dict({**scheduler.state_dict(), **json.loads(file.metadata()["scheduler"])})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of a learner's checkpoint, made by any number of ranks, under their Hugging Face names.

    Needs no process group. A tied head appears under both of its names. Raises DataError where it cannot be read.
    """
    reader, prefix = dcp.FileSystemReader(folder), "model.causal_lm."
    try:
        stored = reader.read_metadata().state_dict_metadata
        weights = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in stored.items()
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        dcp.load(weights, storage_reader=reader, no_dist=True)
    except (OSError, CheckpointException) as error:
        raise DataError(f"{folder}: cannot read this learner's checkpoint: {error}") from error
    return {name.removeprefix(prefix): weight for name, weight in weights.items()}


def save_student(
    folder: Path, weights: dict[str, Tensor], source: str, *, trust_remote_code: bool, dtype: torch.dtype | None = None
) -> None:
    """A folder that transformers and vLLM load: the trained weights, and the source's config and tokenizer.

    `dtype`: of the weights; None: the source's. Buffers keep their own.
    """
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    dtype = dtype or config.dtype or torch.float32
    config.dtype = dtype
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: a weight that ranks share unevenly comes as a view of a padded one, which safetensors refuses.
    buffers = dict(empty_student(source, attention=None, trust_remote_code=trust_remote_code).named_buffers())
    cast = {name: w.to("cpu", w.dtype if name in buffers else dtype, copy=True) for name, w in weights.items()}
    save_torch_state_dict(cast, folder)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code).save_pretrained(folder)
    has_own = (Path(source) / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(source) if has_own else GenerationConfig.from_model_config(config)
    generation.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors writes files that only their owner may read


def _sharded_state(
    model: DistillationModel, optimizer: torch.optim.Optimizer, mean: WeightMean | None
) -> dict[str, dict]:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    return state if mean is None else {**state, "mean": mean.shards}  # dcp loads these tensors in place


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.safetensors"


def _plain(scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict:
    """The scheduler's counters; its shape comes from the config."""
    state = scheduler.state_dict()
    return {name: state[name] for name in ("last_epoch", "_step_count", "_last_lr")}
