"""The plan's sum for roles that share GPUs, asked before a run starts."""

from __future__ import annotations

import torch

from opsd.config.run import RunConfig
from opsd.errors import ConfigError
from opsd.plan.cluster import ClusterConfig
from opsd.plan.memory import GIB
from opsd.plan.program import planned_job
from opsd.plan.refusals import shared_gpus


def require_shared_room(cfg: RunConfig) -> None:
    """placement.mode=colocated: raises ConfigError where the roles do not fit together on a GPU.

    The GPU is this machine's first. Where the command is started on a node without one nothing is known, nothing asked.
    """
    if cfg.placement.mode == "colocated" and torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / GIB
        for problem in shared_gpus(planned_job(cfg, ClusterConfig(gib_per_gpu=gib))):
            raise ConfigError(problem)
