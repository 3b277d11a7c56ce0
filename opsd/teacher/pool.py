"""The teacher as a scoring service: log-probabilities on the response rows of rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ray import ObjectRef

from opsd.agents.toolbox import AgentSpec
from opsd.agents.trajectories import trajectories_of
from opsd.batch import PendingScores
from opsd.cluster.placement import Placement
from opsd.config.engine import EngineSpec, TeacherConfig
from opsd.engines.events import has_foreign_ids
from opsd.engines.groups import in_order
from opsd.engines.pool import EnginePool
from opsd.engines.sampling import Sampling
from opsd.errors import StageError
from opsd.ops.signals import Statistics
from opsd.teacher.served import ServedTeacher
from opsd.types import Prompt, Rollout


class TeacherPool:
    """Scores rollouts, with the weights that it was started with until it gets others.

    Its engines are Ray actors of this run, or servers elsewhere, which an actor of this run asks (teacher.backend).
    """

    def __init__(
        self,
        spec: EngineSpec[TeacherConfig],
        *,
        role: str = "teacher",
        placement: Placement | None = None,
        statistics: Statistics | None = None,
        max_restarts: int = 0,
        agents: AgentSpec | None = None,
    ) -> None:
        """`role` names the actors. `statistics`: of each token that is scored, see `rollout_stats`. `max_restarts`: how
        often engines that are lost are started again; not where they follow the student, whose older weights are gone.
        `agents`: with what tools it answers for its accuracy, as the student does.
        """
        self.agents = agents
        self.cfg = spec.config
        self.vocabulary = spec.vocabulary
        self.statistics = statistics
        made = ServedTeacher if spec.config.remote else EnginePool
        self.engines: EnginePool = made(role, spec, placement, keeps_payload=True)
        if spec.config.follow_decay is None:
            self.engines.actors.restart_lost(max_restarts, None)

    def wait_ready(self) -> None:
        self.engines.wait_ready()

    def sleep(self) -> None:
        """The GPUs are the learner's until the next call; see placement.mode=colocated. Servers have their own."""
        if not self.cfg.remote:
            self.engines.sleep()

    @property
    def busy_s(self) -> dict[str, list[float]]:
        """As RolloutPool.busy_s; nothing of servers elsewhere, which may work for others."""
        return {} if self.cfg.remote else {self.engines.role: self.engines.busy_s}

    @property
    def num_restarts(self) -> int:
        """Actors that were lost and are there again; servers elsewhere look after themselves."""
        return self.engines.actors.num_restarts

    def begin(self, groups: Iterable[dict[int, Rollout]]) -> list[PendingScores]:
        """Hands each group of rollouts (by place) to the engines as it comes; does not wait for their scores.

        A rollout with a token outside the shared vocabulary is not scored: the teacher may not know it.
        """
        pending = []
        for group in groups:
            known = {place: r for place, r in group.items() if not has_foreign_ids(r.read_ids, self.vocabulary)}
            if not self.cfg.can.reads_embeddings and any(r.mixture is not None for r in known.values()):
                raise StageError(f"score: backend={self.cfg.backend} reads token ids, not mixed embeddings")
            parts = self.engines.score(list(known.values()), self.cfg.top_k, self.statistics)
            pending.append(
                PendingScores(
                    rollouts=group,
                    scored_places=tuple(known),
                    parts=parts,
                    engines=self.engines,
                    teacher=self.cfg.where,
                )
            )
        return pending

    def update_weights(self, weights: ObjectRef) -> None:
        """New weights (a reference to a state dict) into every running engine; servers take none."""
        assert not self.cfg.remote, "teacher.follow_decay and a server: the config refuses it"
        self.engines.update_weights(weights, policy_version=0)

    def sample(self, prompts: list[Prompt], seeds: list[int], max_tokens: int) -> Iterator[dict[int, Rollout]]:
        """One answer of the teacher per prompt, at temperature 1, by its place, with its log-probabilities."""
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=max_tokens, num_candidates=1)
        requests = [(prompt, 0, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return self.engines.generate(requests, sampling, 0)

    def greedy(self, prompts: list[Prompt], max_tokens: int) -> list[Rollout]:
        """The teacher's own answers, for its accuracy."""
        sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=max_tokens, num_candidates=1)
        requests = [(prompt, 0, 0) for prompt in prompts]
        if self.agents is None:
            return in_order(self.engines.generate(requests, sampling, 0))
        assert not self.cfg.remote, "tools and a server: opsd.agents.check refuses it"
        wrap = trajectories_of(self.agents, keeps_tools=False)  # a run asks once
        return in_order(self.engines.generate(requests, sampling, 0, wrap=wrap))
