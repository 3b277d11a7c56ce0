"""Who runs where, and with how much memory: the rows of the plan's table."""

from __future__ import annotations

from dataclasses import dataclass

from opsd.config.engine import RolloutConfig, TeacherConfig
from opsd.config.run import RunConfig
from opsd.plan.cluster import ClusterConfig
from opsd.plan.memory import GIB, Memory, driver_memory, learner_memory, rollout_memory, teacher_memory
from opsd.plan.models import ModelSizes
from opsd.plan.traffic import Traffic, step_traffic
from opsd.teacher.sources import teachers_by_source


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A section of the config that describes inference engines of this run, and their model."""

    section: str  # rollout | teacher | teacher.by_source.NAME
    config: RolloutConfig | TeacherConfig
    model: ModelSizes

    @property
    def actor(self) -> str:
        """What the actors' names begin with."""
        return self.section.replace(".by_source.", "-")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is planned: a run's settings, the machines, and the models. A teacher behind HTTP is no part of it."""

    cfg: RunConfig
    cluster: ClusterConfig
    device: str  # cpu | cuda
    student: ModelSizes
    teachers: tuple[Engine, ...]

    @property
    def engines(self) -> list[Engine]:
        return [Engine(section="rollout", config=self.cfg.rollout, model=self.student), *self.teachers]

    @property
    def teacher_configs(self) -> dict[str, TeacherConfig]:
        """By section."""
        return {engine.section: engine.config for engine in self.teachers if isinstance(engine.config, TeacherConfig)}

    @property
    def traffic(self) -> Traffic:
        return step_traffic(self.cfg, self.student, self.teachers[0].model if self.teachers else None)

    @property
    def gpu_bytes(self) -> float:
        return self.cluster.gib_per_gpu * GIB


@dataclass(frozen=True, kw_only=True)
class Role:
    """Processes that are alike: their number, the GPUs that each has, and the memory of each GPU.

    Without GPUs the memory is that of the process and of those that it starts.
    """

    name: str  # driver | learner | an engine's actor
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


def plan_roles(job: Job) -> list[Role]:
    """All of them. The driver is a process on the host."""
    served = any(teacher.remote for teacher in teachers_by_source(job.cfg.teacher).values())
    memory = driver_memory(job.traffic, job.cfg.schedule.max_staleness, asks_servers=served)
    driver = Role(name="driver", processes=1, gpus_each=0, memory=memory)
    return [driver, *(engine_role(job, engine) for engine in job.engines), learner_role(job)]


def engine_role(job: Job, engine: Engine) -> Role:
    config, rest = engine.config, (engine.model, job.traffic, job.device, job.gpu_bytes)
    if isinstance(config, RolloutConfig):
        memory = rollout_memory(job.cfg, config, *rest)
    else:
        memory = teacher_memory(job.cfg, config, *rest)
    return Role(
        name=engine.actor,
        processes=config.num_workers,
        gpus_each=config.tensor_parallel_size if job.device == "cuda" else 0,
        memory=memory,
    )


def learner_role(job: Job) -> Role:
    takes_hidden = job.cfg.loss.payload == "hidden" and job.teachers
    return Role(
        name="learner",
        processes=job.cfg.learner.num_workers,
        gpus_each=int(job.device == "cuda"),
        memory=learner_memory(job.cfg, job.student, job.device, job.teachers[0].model if takes_hidden else None),
    )
