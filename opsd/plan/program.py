"""The command line of the plan: a training's config and overrides, `cluster.*` for the machines, and `simulate.*`."""

from __future__ import annotations

import os
import sys
from dataclasses import field, make_dataclass
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from opsd.config.auto import planned_device, with_dtypes
from opsd.config.payload import with_payload
from opsd.config.run import RunConfig, compose_config
from opsd.config.setting_names import refuse_misspelt
from opsd.errors import ConfigError, DataError
from opsd.hook_checks import check_hooks
from opsd.hooks import bind_objective, load_build_hooks
from opsd.ops.losses.objective import Objective
from opsd.plan.cluster import ClusterConfig
from opsd.plan.models import read_model
from opsd.plan.refusals import refusals
from opsd.plan.roles import Engine, Job
from opsd.plan.simulate.config import SimulateConfig
from opsd.plan.simulate.text import simulation_text
from opsd.plan.table import plan_text
from opsd.plan.traffic import candidates_scored
from opsd.teacher.sources import section_of, teachers_by_source


def launch(config_class: type[RunConfig], conf_module: str, config_name: str) -> None:
    """Prints the plan, and what a simulation says where there is one; what would be refused follows on stderr, a
    sentence each, with exit code 1."""
    cluster = ("cluster", ClusterConfig, field(default_factory=ClusterConfig))
    simulate = ("simulate", SimulateConfig, field(default_factory=SimulateConfig))
    planned_class = make_dataclass("PlannedRun", [cluster, simulate], bases=(config_class,))
    ConfigStore.instance().store(name="schema", node=planned_class)

    @hydra.main(version_base=None, config_path=f"pkg://{conf_module}", config_name=config_name)
    def main(hydra_cfg: DictConfig) -> None:
        try:
            cfg: Any = compose_config(hydra_cfg, planned_class)  # of a class that is made here
            hooks = load_build_hooks(cfg.hooks)(cfg)
            cfg = with_payload(cfg, by_token=Objective.of(hooks.divergence).by_token)
            check_hooks(hooks, cfg)
            job = planned_job(cfg, cfg.cluster)
        except (ConfigError, DataError) as error:
            problems = [str(error)]
        else:
            print(plan_text(job))
            problems = [*refusals(job), *print_simulation(job, cfg.simulate)]
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        sys.exit(1 if problems else 0)

    sys.path.insert(0, os.getcwd())  # a user's hooks module lies where the command is started
    try:
        refuse_misspelt(sys.argv[1:], planned_class, conf_module)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    main()


def print_simulation(job: Job, cfg: SimulateConfig) -> list[str]:
    """Where rates are given. Returns why there can be none."""
    if not cfg.wanted:
        return []
    try:
        print(f"\n{simulation_text(job, cfg)}")
    except (ConfigError, DataError) as error:
        return [str(error)]
    return []


def planned_job(cfg: RunConfig, cluster: ClusterConfig) -> Job:
    """Raises ConfigError where a model's sizes are not to be had. device=cuda is planned for without a GPU here."""
    device = planned_device(cfg.device)
    cfg = with_payload(with_dtypes(cfg, device), by_token=bind_objective(cfg.loss).by_token)
    teachers = {section_of(source): teacher for source, teacher in teachers_by_source(cfg.teacher).items()}
    candidates_scored(cfg)  # refuses what a teacher cannot do, before it is counted
    return Job(
        cfg=cfg,
        cluster=cluster,
        device=device,
        student=read_model(
            "student",
            cfg.student.path,
            trust_remote_code=cfg.student.trust_remote_code,
            lora=cfg.student.lora,
        ),
        teachers=tuple(
            Engine(
                section=section,
                config=teacher,
                model=read_model(section, teacher.path, trust_remote_code=teacher.trust_remote_code),
            )
            for section, teacher in teachers.items()
            if not teacher.remote
        ),
    )
