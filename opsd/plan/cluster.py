"""The machines that a plan is for."""

from __future__ import annotations

import os
from dataclasses import dataclass

from opsd.config.run import at_least, positive


@dataclass
class ClusterConfig:
    """Settings of the plan alone: `cluster.nodes=2` and so on. A training takes the machines that Ray shows it."""

    nodes: int = 1  # machines
    gpus_per_node: int = 8  # of each machine
    gib_per_gpu: float = 80.0  # memory of a GPU
    host_gib: float = 0.0  # memory of a node, which a run on the CPU lives in; 0: this machine's
    cores: int = 0  # of a node, which the workers of a run on the CPU share; 0: this machine's

    def __post_init__(self) -> None:
        at_least("cluster.nodes", self.nodes, 1)
        at_least("cluster.gpus_per_node", self.gpus_per_node, 1)
        positive("cluster.gib_per_gpu", self.gib_per_gpu)
        if self.host_gib == 0:
            self.host_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        positive("cluster.host_gib", self.host_gib)
        at_least("cluster.cores", self.cores, 0)
        self.cores = self.cores or len(os.sched_getaffinity(0))

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node
