"""Where a run's roles sit, and how far one of them may run ahead of another."""

from __future__ import annotations

from dataclasses import dataclass

from opsd.config.checks import at_least, one_of, seconds
from opsd.errors import ConfigError


@dataclass
class PlacementConfig:
    """Which GPUs and nodes of a Ray cluster the roles get. A node's label: ray start --labels nodes=NAME."""

    mode: str = "separate"  # separate: each role has GPUs of its own | colocated: they share GPUs and take turns
    rollout_nodes: str = ""  # label of the nodes that the rollout engines run on; empty: any node
    teacher_nodes: str = ""  # the same for the teacher's engines, or the client of its servers
    learner_nodes: str = ""  # the same for the learner's ranks
    # A worker that gives no answer for so long counts as lost (see max_restarts): more than the longest start or stage.
    answer_s: float = 3600.0
    wait_s: float = 120.0  # for GPUs that other runs still hold, or nodes that are still starting

    def __post_init__(self) -> None:
        one_of("placement.mode", self.mode, ("separate", "colocated"))
        if self.mode == "colocated" and len({self.rollout_nodes, self.teacher_nodes, self.learner_nodes}) > 1:
            raise ConfigError(
                "placement.mode=colocated puts all roles on the same GPUs: rollout_nodes, teacher_nodes and "
                f"learner_nodes must be equal, got {self.rollout_nodes!r}, {self.teacher_nodes!r}, "
                f"{self.learner_nodes!r}"
            )
        seconds("placement.answer_s", self.answer_s)
        seconds("placement.wait_s", self.wait_s)


@dataclass
class ScheduleConfig:
    # 0: the loop's stages take turns, and a step learns from the answers of the weights that it changes. n: the answers
    # to learn from are made n steps ahead, while the learner works, so they are of weights n steps older (fewer in the
    # first n steps of a run or of its continuation). Needs placement.mode=separate.
    max_staleness: int = 0
    # An engine takes new weights between two steps of its decoding, and what is unfinished goes on under them, so that
    # no answer holds them back; each token knows the weights that drew it. What is drawn by which depends on the clock:
    # no two runs are alike.
    partial_rollouts: bool = False

    def __post_init__(self) -> None:
        at_least("schedule.max_staleness", self.max_staleness, 0)
        if self.partial_rollouts and not self.max_staleness:
            raise ConfigError(
                "schedule.partial_rollouts=true needs schedule.max_staleness of at least 1, got 0: no weights come "
                "while answers are made"
            )
