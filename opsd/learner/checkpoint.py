"""Saving and loading the learner's state, and writing the student as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from opsd.errors import DataError
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


def save_student(folder: Path, weights: dict[str, Tensor], source: str, *, trust_remote_code: bool) -> None:
    """A folder that transformers and vLLM load: the trained weights in the source's dtype, its config and tokenizer."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    dtype = config.dtype or torch.float32
    folder.mkdir(parents=True, exist_ok=True)
    # Copies: a weight that ranks share unevenly comes as a view of a padded one, which safetensors refuses.
    save_torch_state_dict({name: w.to("cpu", dtype, copy=True) for name, w in weights.items()}, folder)
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code).save_pretrained(folder)
    if (Path(source) / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(source).save_pretrained(folder)


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
