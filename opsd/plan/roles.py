"""Who runs where, and with how much memory: the rows of the plan's table."""

from __future__ import annotations

from dataclasses import dataclass

from opsd.config import RunConfig
from opsd.plan.cluster import ClusterConfig
from opsd.plan.memory import GIB, Memory, driver_memory, learner_memory, rollout_memory, teacher_memory
from opsd.plan.models import ModelSizes
from opsd.plan.traffic import Traffic, step_traffic


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned: a run's settings, the machines, and the two models."""

    cfg: RunConfig
    cluster: ClusterConfig
    device: str  # cpu | cuda
    student: ModelSizes
    teacher: ModelSizes

    @property
    def traffic(self) -> Traffic:
        return step_traffic(self.cfg, self.student)

    @property
    def gpu_bytes(self) -> float:
        return self.cluster.gib_per_gpu * GIB


@dataclass(frozen=True, kw_only=True)
class Role:
    """Processes that are alike: their number, the GPUs that each has, and the memory of each GPU (or process)."""

    name: str  # driver | rollout | teacher | learner
    processes: int
    gpus_each: int
    memory: Memory

    @property
    def num_gpus(self) -> int:
        return self.processes * self.gpus_each

    @property
    def actors(self) -> str:
        """As the Ray dashboard names them, for example `learner-0..3`."""
        if self.name == "driver":
            return self.name
        return f"{self.name}-0" if self.processes == 1 else f"{self.name}-0..{self.processes - 1}"


def plan_roles(job: Job) -> dict[str, Role]:
    """By name. The driver is always a process on the host."""
    cfg, device, traffic, on_gpus = job.cfg, job.device, job.traffic, job.device == "cuda"
    roles = [
        Role(name="driver", processes=1, gpus_each=0, memory=driver_memory(traffic)),
        Role(
            name="rollout",
            processes=cfg.rollout.num_workers,
            gpus_each=cfg.rollout.tensor_parallel_size * on_gpus,
            memory=rollout_memory(cfg, job.student, traffic, device, job.gpu_bytes),
        ),
        Role(
            name="teacher",
            processes=cfg.teacher.num_workers,
            gpus_each=cfg.teacher.tensor_parallel_size * on_gpus,
            memory=teacher_memory(cfg, job.teacher, traffic, device, job.gpu_bytes),
        ),
        Role(
            name="learner",
            processes=cfg.learner.num_workers,
            gpus_each=int(on_gpus),
            memory=learner_memory(cfg, job.student, device),
        ),
    ]
    return {role.name: role for role in roles}
