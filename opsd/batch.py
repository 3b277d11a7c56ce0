"""The batch of a step: rollouts on their way through the teacher, and those that came back to be learnt from."""
# R rollouts of a batch, T response tokens of all of them

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from opsd.errors import StageError
from opsd.ops.align import TokenRows, token_stats
from opsd.ops.signals import Statistics
from opsd.score_checks import check_scores
from opsd.types import BatchStats, NoScores, Rollout, ScoredRollout, TeacherScores, TokenStats, Vocabulary

FOREIGN = NoScores(reason="foreign_token")


class Scorer(Protocol):
    """Engines, or servers, that were given rollouts to score and know this work by `parts`."""

    def are_scored(self, parts: list[Any], /) -> bool: ...

    def scores(self, parts: list[Any], /) -> Sequence[TeacherScores | NoScores]: ...


@dataclass(frozen=True, kw_only=True)
class PendingScores:
    """A group of rollouts that a teacher is scoring."""

    rollouts: dict[int, Rollout]  # by place in the global batch
    scored_places: tuple[int, ...]  # of those that are scored, in the order of the scores; the others are foreign
    parts: list[Any]  # what the engines know their work by
    engines: Scorer
    teacher: str  # its folder or addresses, for messages
    vocabulary: Vocabulary

    def is_scored(self) -> bool:
        """Whether all of its scores are there. Does not wait."""
        return self.engines.are_scored(self.parts)

    def scores(self) -> dict[int, TeacherScores | NoScores]:
        """The scores of each rollout by its place, or why it has none. Waits for them."""
        return dict.fromkeys(self.rollouts, FOREIGN) | dict(
            zip(self.scored_places, self.engines.scores(self.parts), strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """The rollouts that a step learns from, each with its scores; statistics, selection and packing read this one.

    Their tokens stand one after another, in this order, in every tensor [T] of the step.
    """

    items: tuple[ScoredRollout, ...]  # R, at least one
    dropped: Counter[str] = field(default_factory=Counter)  # rollouts that are left out, by reason
    num_generated: int = 0  # tokens of all rollouts of the step, those left out included
    num_scored: int = 0  # tokens for which the teacher gave scores, NaN or not

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 [R + 1]: the tokens of item r stand at bounds[r] .. bounds[r + 1] - 1; the last is T."""
        return np.cumsum([0, *(len(item.rollout) for item in self.items)])

    @property
    def num_tokens(self) -> int:
        return int(self.bounds[-1])

    @property
    def rollouts(self) -> list[Rollout]:
        return [item.rollout for item in self.items]


def scored_batch(pending: Sequence[PendingScores]) -> ScoredBatch:
    """Waits for all scores. Without the rollouts that have none, and those with a NaN score: these are counted.

    In the order of the places, whenever the scores came. Raises StageError where nothing is left, and where a teacher's
    scores cannot be those of the tokens that it was asked about.
    """
    rollouts = {place: rollout for group in pending for place, rollout in group.rollouts.items()}
    scores = {place: found for group in pending for place, found in group.scores().items()}
    without = [found for found in scores.values() if isinstance(found, NoScores)]
    known = {
        place: ScoredRollout(rollout=rollouts[place], scores=found)
        for place, found in sorted(scores.items(), key=itemgetter(0))
        if not isinstance(found, NoScores)
    }
    usable = {place: item for place, item in known.items() if not item.scores.has_nan()}
    dropped = Counter(foreign_token=0, nan_score=len(known) - len(usable))
    dropped.update(each.reason for each in without)
    if not usable:
        said = next((f"; the teacher said: {each.said}" for each in without if each.said), "")
        raise StageError(
            f"score: none of {len(rollouts)} rollouts can be used: {dropped['foreign_token']} hold a token outside the "
            f"shared vocabulary, {dropped['nan_score']} have NaN in the teacher's scores, "
            f"{dropped['teacher_refused']} were refused by it, {dropped['teacher_error']} it failed on{said}"
        )
    for teacher, vocabulary in {group.teacher: group.vocabulary for group in pending}.items():
        places = [place for group in pending if group.teacher == teacher for place in group.rollouts]
        check_scores(teacher, [usable[place] for place in sorted(places) if place in usable], vocabulary)
    return ScoredBatch(
        items=tuple(usable.values()),
        dropped=dropped,
        num_generated=sum(map(len, rollouts.values())),
        num_scored=sum(len(item.rollout) for item in known.values()),
    )


def rollout_stats(scored: ScoredBatch, vocabulary: Vocabulary, statistics: Statistics | None = None) -> TokenStats:
    """The statistics of all tokens, from what the engines returned: no forward pass."""
    groups = TokenRows.in_groups(scored.items, vocabulary)
    return TokenStats.concatenate([token_stats(rows, vocabulary, statistics) for rows in groups])


def batch_stats(
    step: int, scored: ScoredBatch, tokens: TokenStats, reward_R: Tensor | None, *, num_steps: int
) -> BatchStats:
    """The batch as the selection sees it; `tokens` and `reward_R` are those of `scored`, in order."""
    rollouts = scored.rollouts
    return BatchStats(
        step=step,
        progress=step / num_steps,
        num_steps=num_steps,
        lengths=tuple(len(rollout) for rollout in rollouts),
        tokens=tokens,
        prompt_R=torch.tensor([rollout.prompt.index for rollout in rollouts]),
        sample_R=torch.tensor([rollout.sample for rollout in rollouts]),
        on_policy_R=torch.tensor([rollout.policy_version >= 0 for rollout in rollouts]),
        reward_R=reward_R,
    )
