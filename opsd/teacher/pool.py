"""The teacher as a scoring service: log-probabilities on the response rows of rollouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import ray
from ray import ObjectRef

from opsd.config import TeacherConfig
from opsd.engines.pool import EnginePool
from opsd.engines.rows import has_foreign_ids, in_order
from opsd.placement import gather
from opsd.types import Prompt, Rollout, Sampling, TeacherScores, Vocabulary


@dataclass(frozen=True, kw_only=True)
class PendingScores:
    """A group of rollouts that the engines are scoring."""

    rollouts: dict[int, Rollout]  # by place in the global batch
    scored_places: tuple[int, ...]  # of those that are scored, in the order of the scores
    refs: list[ObjectRef]  # to lists of TeacherScores

    def is_scored(self) -> bool:
        """Whether all of its scores are there. Does not wait."""
        if not self.refs:
            return True
        _, missing = ray.wait(self.refs, num_returns=len(self.refs), timeout=0, fetch_local=False)
        return not missing


class TeacherPool:
    """Scores rollouts, with the weights that it was started with until it gets others."""

    def __init__(self, cfg: TeacherConfig, *, vocabulary: Vocabulary, device: str, max_model_tokens: int) -> None:
        self.cfg = cfg
        self.vocabulary = vocabulary
        self.engines = EnginePool(
            "teacher",
            cfg.path,
            cfg,
            vocabulary=vocabulary,
            device=device,
            max_model_tokens=max_model_tokens,
            trust_remote_code=cfg.trust_remote_code,
            max_batch_tokens=cfg.max_batch_tokens,
        )

    def wait_ready(self) -> None:
        self.engines.wait_ready()

    def begin(self, groups: Iterable[dict[int, Rollout]]) -> list[PendingScores]:
        """Hands each group of rollouts (by place) to the engines as it comes; returns after the last, not its scores.

        A rollout with a token outside the shared vocabulary is not scored: the teacher may not know it.
        """
        pending = []
        for group in groups:
            known = {place: r for place, r in group.items() if not has_foreign_ids(r.response_ids, self.vocabulary)}
            refs = self.engines.score(list(known.values()), self.cfg.top_k)
            pending.append(PendingScores(rollouts=group, scored_places=tuple(known), refs=refs))
        return pending

    def finish(self, pending: list[PendingScores]) -> list[tuple[Rollout, TeacherScores | None]]:
        """Each rollout with its scores, by place, whenever they came; None: it was not scored."""
        rollouts, scores = {}, {}
        for group in pending:
            rollouts.update(group.rollouts)
            parts = gather("score", group.refs)
            scores.update(zip(group.scored_places, itertools.chain.from_iterable(parts), strict=True))
        return [(rollouts[place], scores.get(place)) for place in sorted(rollouts)]

    def update_weights(self, weights: ObjectRef) -> None:
        """New weights (a reference to a state dict) into every running engine."""
        self.engines.update_weights(weights, policy_version=0)

    def sample(self, prompts: list[Prompt], seeds: list[int], max_tokens: int) -> Iterator[dict[int, Rollout]]:
        """One answer of the teacher a prompt, at temperature 1, by its place, with the teacher's log-probabilities."""
        sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=max_tokens, num_candidates=1)
        requests = [(prompt, 0, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        return self.engines.generate(requests, sampling, 0)

    def greedy(self, prompts: list[Prompt], max_tokens: int) -> list[Rollout]:
        """The teacher's own answers, for its accuracy."""
        sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=max_tokens, num_candidates=1)
        return in_order(self.engines.generate([(prompt, 0, 0) for prompt in prompts], sampling, 0))
