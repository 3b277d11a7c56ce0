"""Several teachers in one run: each rollout goes to the teacher of its prompt's data_source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from opsd.agents.toolbox import AgentSpec
from opsd.cluster.placement import Placement
from opsd.config.engine import EngineSpec, TeacherConfig
from opsd.engines.groups import in_order
from opsd.ops.signals import Statistics
from opsd.teacher.pool import PendingScores, TeacherPool
from opsd.teacher.sources import DEFAULT, source_of
from opsd.types import Prompt, Rollout


def start_teachers(
    specs: dict[str, EngineSpec[TeacherConfig]],
    placement: Placement | None = None,
    statistics: Statistics | None = None,
    *,
    max_restarts: int = 0,
    agents: AgentSpec | None = None,
) -> Teacher:
    """The teacher of a run, or its teachers behind one object that is used alike.

    `specs`: by data_source. `max_restarts`: how often engines of each that are lost are started again. `agents`: see
    TeacherPool.
    """
    pools = {
        source: TeacherPool(
            spec,
            role=f"teacher-{source}".rstrip("-"),
            placement=placement,
            statistics=statistics,
            max_restarts=max_restarts,
            agents=agents,
        )
        for source, spec in specs.items()
    }
    return pools[DEFAULT] if list(pools) == [DEFAULT] else TeacherRouter(pools)


class TeacherRouter:
    """Pools by data_source; DEFAULT's, where there is one, has the sources that no other pool is for."""

    def __init__(self, pools: dict[str, TeacherPool]) -> None:
        self.pools = pools

    def wait_ready(self) -> None:
        for pool in self.pools.values():
            pool.wait_ready()

    def sleep(self) -> None:
        """As TeacherPool.sleep."""
        for pool in self.pools.values():
            pool.sleep()

    @property
    def busy_s(self) -> dict[str, list[float]]:
        """As TeacherPool.busy_s."""
        return {role: seconds for pool in self.pools.values() for role, seconds in pool.busy_s.items()}

    @property
    def num_restarts(self) -> int:
        return sum(pool.num_restarts for pool in self.pools.values())

    def begin(self, groups: Iterable[dict[int, Rollout]]) -> list[PendingScores]:
        """As TeacherPool.begin; each group is divided among the teachers."""
        pending = []
        for group in groups:
            for source, places in self._by_source({place: r.prompt for place, r in group.items()}).items():
                pending += self.pools[source].begin([{place: group[place] for place in places}])
        return pending

    def sample(self, prompts: list[Prompt], seeds: list[int], max_tokens: int) -> Iterator[dict[int, Rollout]]:
        """One answer per prompt, by its place, of the teacher that it has."""
        for source, places in self._by_source(dict(enumerate(prompts))).items():
            own_prompts, own_seeds = [prompts[p] for p in places], [seeds[p] for p in places]
            for group in self.pools[source].sample(own_prompts, own_seeds, max_tokens):
                yield {places[place]: rollout for place, rollout in group.items()}

    def greedy(self, prompts: list[Prompt], max_tokens: int) -> list[Rollout]:
        """The teachers' own answers, each to its own prompts, for their accuracy."""
        groups = []
        for source, places in self._by_source(dict(enumerate(prompts))).items():
            answers = self.pools[source].greedy([prompts[place] for place in places], max_tokens)
            groups.append(dict(zip(places, answers, strict=True)))
        return in_order(groups)

    def _by_source(self, prompts: dict[int, Prompt]) -> dict[str, list[int]]:
        """Places by teacher, ascending."""
        places = defaultdict(list)
        for place in sorted(prompts):
            places[source_of(prompts[place], self.pools)].append(place)
        return dict(places)


Teacher = TeacherPool | TeacherRouter  # of a run: used alike
