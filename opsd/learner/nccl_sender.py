"""The learner's weights into vLLM engines over NCCL, one weight at a time, by vLLM's own transfer engine.

Written after vLLM 0.32's interfaces for two machines with GPUs: untested but for what a rank sends. Importing this
module imports vLLM.
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
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from opsd.learner.model import DistillationModel, full_weights, trained_tensors
from opsd.placement import gather


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

    def __init__(self, workers: list[ActorHandle], ranks_each: int) -> None:
        self.workers = workers
        self.ranks_each = ranks_each

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        places = [{**init_info, "rank_offset": 1 + i * self.ranks_each} for i in range(len(self.workers))]
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
