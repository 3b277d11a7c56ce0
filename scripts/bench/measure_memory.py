"""The plan's memory beside that of a real run, for every process of it, on a machine without a GPU.

    MEASURE_MEMORY=1 bash recipes/quickstart.sh num_steps=20 output_dir=outputs/memory

Takes the settings of `python -m tip.train`. Measured is the peak of a process's resident set, from its start to the
run's end, as the kernel keeps it (VmHWM, Linux): what `top` shows at the worst moment, with the libraries that the
processes share counted in each. The kernel may take back pages of a file that were read once, so on a machine short of
memory the peak comes out too small.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from pathlib import Path

import ray
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore

from measure import markdown
from opsd.config.auto import resolve_device, with_dtypes
from opsd.config.run import compose_config
from opsd.data.epochs import with_epochs_as_steps
from opsd.hooks import load_build_hooks
from opsd.plan.cluster import ClusterConfig
from opsd.plan.memory import GIB
from opsd.plan.program import planned_job
from opsd.plan.roles import plan_roles
from opsd.run import started
from opsd.train import loop
from tip.config import TipRunConfig


def main() -> None:
    sys.path.insert(0, os.getcwd())  # a user's hooks module lies where the command is started
    ConfigStore.instance().store(name="schema", node=TipRunConfig)
    with initialize_config_module("tip.conf", version_base=None):
        cfg = with_epochs_as_steps(compose_config(compose("tip", overrides=sys.argv[1:]), TipRunConfig))
    cfg = with_dtypes(cfg, resolve_device(cfg.device))
    planned = {role.name: role.memory.total for role in plan_roles(planned_job(cfg, ClusterConfig()))}
    hooks = load_build_hooks(cfg.hooks)(cfg)
    with started(cfg, hooks) as run:
        loop(run)
        run.finish()
        peaks = {name: sum(map(peak_bytes, pids)) for name, pids in actor_processes().items()}
        peaks = {"driver": peak_bytes(os.getpid())} | peaks
    print(markdown(rows(peaks, planned)))


def actor_processes() -> dict[str, list[int]]:
    """Process ids of the run's actors, and of those that they started, by the actors' names on the dashboard."""
    names = sorted(ray.util.list_named_actors())
    pids = [ray.get_actor(name).__ray_call__.remote(lambda actor: own_processes()) for name in names]
    return dict(zip(names, ray.get(pids), strict=True))


def own_processes() -> list[int]:
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children())]


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def rows(peaks: dict[str, int], planned: dict[str, float]) -> list[list[str]]:
    """A line per process: the actor `learner-1` is planned for as a `learner`."""
    table = [["process", "measured GiB", "plan GiB", "plan / measured"]]
    for name, peak in peaks.items():
        plan = planned[name.rpartition("-")[0] or name]
        table.append([name, f"{peak / GIB:.2f}", f"{plan / GIB:.2f}", f"{plan / peak:.2f}"])
    return table


if __name__ == "__main__":
    main()
