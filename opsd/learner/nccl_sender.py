"""The learner's weights into vLLM engines without a copy on the CPU, by vLLM's own transfer engines.

Over NCCL to engines with GPUs of their own, through CUDA IPC to engines on the learner's GPUs. Written after vLLM
0.32's sources and not run on a GPU; tested is what a rank sends and what the engines are told. Importing this module
imports vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from ray.actor import ActorHandle
from torch import Tensor
from torch.distributed.tensor import DTensor
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from opsd.cluster.ray import gather
from opsd.learner.model import DistillationModel, full_weights, trained_tensors


class TrainedWeights(WeightSource):
    """What is sent, in one order: every weight once (a tied head as the embedding), whole, in the engines' dtype, and
    the buffers that files hold, in their own."""

    def __init__(self, model: DistillationModel, dtype: torch.dtype, device: torch.device) -> None:
        self.model = model
        self.dtype = dtype
        self.device = device

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(
                name.removeprefix("causal_lm."),
                self.dtype if isinstance(tensor, DTensor) else tensor.dtype,
                tuple(tensor.shape),
            )
            for name, tensor in trained_tensors(self.model)
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in full_weights(trained_tensors(self.model), self.dtype):
            yield name, weight.to(self.device)


class EngineGroup:
    """The receiving side, as vLLM's sender drives it (its VLLMWeightSyncClient protocol).

    vLLM's own client for Ray gives every engine the same place in the NCCL group; these are engines of their own.
    """

    def __init__(self, workers: list[ActorHandle], ranks_each: int | None) -> None:
        """`ranks_each`: places of an engine in the NCCL group; None: there is no such group."""
        self.workers = workers
        self.ranks_each = ranks_each

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        places = [dict(init_info) for _ in self.workers]
        if self.ranks_each is not None:
            for index, place in enumerate(places):
                place["rank_offset"] = 1 + index * self.ranks_each
        self._all("init_weight_transfer_engine", [({"init_info": place},) for place in places])

    def start_weight_update(self) -> None:
        self._all("start_weight_update", [()] * len(self.workers))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._all("update_weights", [({"update_info": update_info},)] * len(self.workers))

    def finish_weight_update(self) -> None:
        self._all("finish_weight_update", [()] * len(self.workers))

    def _all(self, call: str, arguments: list[tuple]) -> None:
        pairs = zip(self.workers, arguments, strict=True)
        gather("sync", [worker.weight_transfer.remote(call, *own) for worker, own in pairs])


def nccl_sender(
    weights: TrainedWeights, *, rank: int, address: tuple[str, int], workers: list[ActorHandle], ranks_each: int
) -> TrainerWeightTransferEngine:
    """Its `send_weights()` is a collective of all learner ranks; rank 0 sends. Called on every rank at once.

    `address`: a free one on rank 0's node. `workers`: EngineWorkers with `ranks_each` GPUs each.
    """
    place = NCCLTrainerInitInfo(
        rank=rank, master_address=address[0], master_port=address[1], world_size=1 + len(workers) * ranks_each
    )
    return WeightTransferTrainerFactory.trainer_init(place, client=EngineGroup(workers, ranks_each), source=weights)


def ipc_sender(weights: TrainedWeights, *, rank: int, workers: list[ActorHandle]) -> TrainerWeightTransferEngine:
    """As nccl_sender, to `workers` on GPUs that learner ranks have too: each opens what the rank on its GPU holds.

    Packed: a rank shares one buffer of vLLM's size at a time, not a copy of the model.
    """
    place = IPCTrainerInitInfo(rank=rank, packed=True)
    return WeightTransferTrainerFactory.trainer_init(place, client=EngineGroup(workers, None), source=weights)
