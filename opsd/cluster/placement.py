"""Which node and which GPU each actor gets: a role's seats are reserved as a whole before any of its actors starts."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opsd.config.auto import joins_cluster
from opsd.config.run import RunConfig
from opsd.errors import ConfigError

Seat = dict[str, Any]  # options of one Ray actor

LABEL = "nodes"  # of a Ray node: ray start --labels nodes=NAME
SHARE = 0.1  # of a GPU, as Ray counts it, for each actor of a colocated run; its memory share is the engine's setting
SOON_S = 5.0  # a reservation that takes longer is worth a line


class Engines(Protocol):
    """What Placement needs of a pool."""

    def wait_ready(self) -> None: ...

    def sleep(self) -> None: ...


class Placement:
    """Seats for the roles of one run.

    separate: each role's actors have GPUs of their own, packed on as few nodes as possible. colocated (GPU only,
    untested on one): actor i of every role sits on the i-th GPU. Without GPUs a role is packed on one node. A role with
    a label sits on nodes with that label only.
    """

    def __init__(self, cfg: RunConfig, device: str) -> None:
        """Raises ConfigError where the cluster has GPUs that the run does not see, or no room."""
        self.cfg = cfg.placement
        self.device = device
        self._shared: PlacementGroup | None = None
        num_gpus = ray.cluster_resources().get("GPU", 0)
        if cfg.device == "auto" and device == "cpu" and num_gpus:
            raise ConfigError(
                f"device=auto: torch sees no GPU here, the Ray cluster has {num_gpus:g}: set device=cuda or device=cpu"
            )
        if self.cfg.mode == "colocated":
            num_shared = max(role.num_workers for role in (cfg.rollout, cfg.teacher, cfg.learner))
            self._shared = self._reserve("all roles", [{"GPU": 1}] * num_shared, self.cfg.learner_nodes)

    @property
    def shares_gpus(self) -> bool:
        return self._shared is not None

    def seats(self, role: str, num_actors: int, gpus_each: int) -> list[Seat]:
        """`role` is rollout, teacher (or teacher-SOURCE) or learner.

        Raises ConfigError where there is no room within placement.wait_s.
        """
        if self._shared is not None:
            group, gpus = self._shared, SHARE
        else:
            gpus = gpus_each if self.device == "cuda" else 0
            bundle: dict[str, float] = {"GPU": gpus} if gpus else {"CPU": 0.001}  # a bundle must ask for something
            group = self._reserve(role, [bundle] * num_actors, getattr(self.cfg, f"{role.split('-')[0]}_nodes"))
        if joins_cluster():
            where = placement_group_table(group)["bundles_to_node_id"]
            names = {node["NodeID"]: _name(node) for node in ray.nodes()}
            _say(f"{role} on {', '.join(sorted({names[where[index]] for index in range(num_actors)}))}")
        return [
            {
                "num_gpus": gpus,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            }
            for index in range(num_actors)
        ]

    def settle(self, engines: Engines) -> None:
        """Colocated: a pool starts alone on its GPUs, since vLLM measures their free memory, and then leaves them."""
        if self.shares_gpus:
            engines.wait_ready()
            engines.sleep()

    def _reserve(self, role: str, bundles: list[dict[str, float]], nodes: str) -> PlacementGroup:
        selector = [{LABEL: nodes}] * len(bundles) if nodes else None
        group = placement_group(bundles, strategy="PACK", bundle_label_selector=selector)
        if group.wait(min(SOON_S, self.cfg.wait_s)):
            return group
        each = f"{bundles[0]['GPU']:g} GPUs" if "GPU" in bundles[0] else "a process"
        wanted = f"{role}: {len(bundles)} x {each}" + (f" on nodes labelled {LABEL}={nodes}" if nodes else "")
        alive = [f"{_name(node)}: {node['Resources'].get('GPU', 0):g} GPUs" for node in ray.nodes() if node["Alive"]]
        there = f"the Ray cluster has {', '.join(sorted(alive))}"
        _say(f"waiting up to {self.cfg.wait_s:g} s for {wanted}; {there}")
        if group.wait(self.cfg.wait_s):
            return group
        remove_placement_group(group)
        raise ConfigError(f"placement: no room for {wanted} within placement.wait_s={self.cfg.wait_s:g}; {there}")


def _name(node: dict[str, Any]) -> str:
    """What a person calls a node: its address, and its label where it has one."""
    label = node["Labels"].get(LABEL)
    return node["NodeManagerAddress"] + (f" ({LABEL}={label})" if label else "")


def _say(line: str) -> None:
    print(f"place   {line}", file=sys.stderr, flush=True)
