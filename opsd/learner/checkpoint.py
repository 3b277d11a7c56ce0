"""Saving and loading the learner's state."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from opsd.errors import DataError
from opsd.learner.mean import WeightMean
from opsd.learner.model import DistillationModel, trained_tensors
from opsd.learner.shards import RankPart, Shards, first_row, rank_part

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter
COUNTERS = ("last_epoch", "_step_count", "_last_lr")  # of the scheduler, whose shape comes from the config
WEIGHT = "weight."  # what a name in the files begins with
ADAPTER = "adapter"  # the header's entry: the facts of an adapter, where one trains


def part_of_checkpoint(
    model: DistillationModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    mean: WeightMean | None,
    *,
    copy: bool = False,
    adapter: dict[str, Any] | None = None,
) -> RankPart:
    """This rank's part of what trains, optimiser, schedule and `mean`, and its RNG; any number of ranks can load them.

    `copy`: it stays as it is while training goes on. `adapter`: the facts of one that trains in the weights' place, see
    `opsd.models.lora.adapter_facts`: then the frozen weights are not in it.
    """
    rank, counters = dist.get_rank(), scheduler.state_dict()
    own = {f"rng.{rank}": torch.get_rng_state()}
    if torch.cuda.is_available():
        own[f"cuda_rng.{rank}"] = torch.cuda.get_rng_state()
    return rank_part(
        _tensors(model, optimizer, mean),
        own,
        rank=rank,
        num_ranks=dist.get_world_size(),
        header={
            "scheduler": json.dumps({name: counters[name] for name in COUNTERS}),
            "moments": json.dumps(bool(optimizer.state)),  # none before the first step
            **({ADAPTER: json.dumps(adapter)} if adapter else {}),
        },
        copy=copy,
    )


def load_learner(
    folder: Path,
    model: DistillationModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    mean: WeightMean | None,
) -> None:
    """Become the learner whose ranks wrote these parts. Raises DataError, with nothing changed, where it is another."""
    rank = dist.get_rank()
    with Shards(folder) as stored:
        require_fit(stored, model, mean)
        schedule = stored.noted("scheduler")
        if stored.noted("moments"):
            _begin_moments(optimizer)
        for name, tensor in _tensors(model, optimizer, mean):
            _fill(tensor, stored, name)
        own = rank if f"rng.{rank}" in stored.shapes else 0
        torch.set_rng_state(stored.tensor(f"rng.{own}"))
        if torch.cuda.is_available() and f"cuda_rng.{own}" in stored.shapes:
            torch.cuda.set_rng_state(stored.tensor(f"cuda_rng.{own}"))
        scheduler.load_state_dict({**scheduler.state_dict(), **schedule})
    # The optimiser's own record is of the run that saved it; a longer one has another rate at this step.
    for group, base, shape in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = base * shape(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of a learner's checkpoint, made by any number of ranks, under their Hugging Face names; of
    one with an adapter, the adapter's alone.

    Needs no process group. A tied head appears under one of its names. Raises DataError where it cannot be read.
    """
    with Shards(folder) as stored:
        names = [name for name in stored.shapes if name.startswith(WEIGHT)]
        return {name.removeprefix(f"{WEIGHT}causal_lm."): stored.tensor(name) for name in names}


def read_adapter_facts(folder: Path) -> dict[str, Any] | None:
    """As `part_of_checkpoint` was given them; None where the student itself was trained. Raises DataError."""
    with Shards(folder) as stored:
        return stored.noted(ADAPTER) if ADAPTER in stored.header else None


def require_fit(stored: Shards, model: DistillationModel, mean: WeightMean | None) -> None:
    """Raises DataError where names or shapes are not those of this learner."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {f"{WEIGHT}{name}": tuple(tensor.shape) for name, tensor in trained_tensors(model)}
    wanted |= {f"mean.{name}": tuple(shard.shape) for name, shard in (mean.shards if mean else {}).items()}
    if stored.noted("moments"):
        for name, parameter in parameters.items():
            shapes = {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
            wanted |= {f"{moment}.{name}": shapes[moment] for moment in MOMENTS}
    found = {name: shape for name, shape in stored.shapes.items() if "rng." not in name}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise DataError(
            f"{stored.folder}: the checkpoint is of another learner: {len(wrong)} tensors differ, the first is {name}: "
            f"{_shape(found.get(name))} in the checkpoint, {_shape(wanted.get(name))} in this run"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"shape {list(shape)}"


def _tensors(
    model: DistillationModel, optimizer: torch.optim.Optimizer, mean: WeightMean | None
) -> Iterator[tuple[str, Tensor]]:
    """All that a checkpoint keeps of a learner, by name; shards where ranks share a tensor."""
    for name, tensor in trained_tensors(model):
        yield f"{WEIGHT}{name}", tensor
    for name, parameter in model.named_parameters():
        for moment, tensor in optimizer.state.get(parameter, {}).items():
            yield f"{moment}.{name}", tensor
    for name, shard in mean.shards.items() if mean else ():
        yield f"mean.{name}", shard


def _begin_moments(optimizer: torch.optim.Optimizer) -> None:
    """The tensors that AdamW makes in its first step, to be filled."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


@torch.no_grad()
def _fill(tensor: Tensor, stored: Shards, name: str) -> None:
    """This rank's part of a stored tensor, in place."""
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        local.copy_(stored.rows(name, first_row(len(tensor), dist.get_rank(), dist.get_world_size()), len(local)))
    else:
        tensor.copy_(stored.tensor(name))
