"""Saving and loading the learner's state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from opsd.errors import DataError
from opsd.learner.mean import WeightMean
from opsd.learner.model import DistillationModel


def save_learner(
    folder: Path,
    model: DistillationModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
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
    scheduler: torch.optim.lr_scheduler.LambdaLR,
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
    # The optimiser's own record is of the run that saved it; a longer one has another rate at this step.
    for group, base, shape in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * shape(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


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


def _sharded_state(
    model: DistillationModel, optimizer: torch.optim.Optimizer, mean: WeightMean | None
) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    return state if mean is None else {**state, "mean": mean.shards}  # dcp loads these tensors in place


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.safetensors"


def _plain(scheduler: torch.optim.lr_scheduler.LambdaLR) -> dict:
    """The scheduler's counters; its shape comes from the config."""
    state = scheduler.state_dict()
    return {name: state[name] for name in ("last_epoch", "_step_count", "_last_lr")}
