"""The batch of a step as the driver knows it: rollouts on their way through the teacher, and those that came back.

Their payload, what both models said of their tokens, stays where it was scored; see opsd.payload.
"""
# R rollouts of a batch, T response tokens of all of them, N kept tokens, P payloads

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from opsd.errors import StageError, common_names
from opsd.payload.keeper import NAN, KeptHere, Payload, ScoredPart, Told, described
from opsd.payload.scored import ScoredBatch
from opsd.types import BatchStats, NoScores, Rollout, ScoredRollout, TokenStats, Vocabulary

FOREIGN = NoScores(reason="foreign_token")


class Scorer(Protocol):
    """Engines, or servers, that were given rollouts to score and know this work by `parts`."""

    def are_scored(self, parts: list[Any], /) -> bool: ...

    def scores(self, parts: list[Any], /) -> Sequence[Told]: ...


class PlacedPart(NamedTuple):
    """A part of a step's rollouts that came back from its teacher."""

    teacher: str
    places: tuple[int, ...]  # of its rollouts in the global batch
    part: ScoredPart
    payload: Payload | None  # None: there is nothing to learn from

    @property
    def usable(self) -> list[int]:
        """The places of the rollouts that can be learnt from."""
        return [place for number, place in enumerate(self.places) if number not in self.part.missing]


@dataclass(frozen=True, kw_only=True)
class PendingScores:
    """A group of rollouts that a teacher is scoring."""

    rollouts: dict[int, Rollout]  # by place in the global batch
    scored_places: tuple[int, ...]  # of those that are scored, in the order of the parts; the others are foreign
    parts: list[Any]  # what the engines know their work by, each with its `num_rollouts`
    engines: Scorer
    teacher: str  # its folder or addresses: a teacher is known by it

    def is_scored(self) -> bool:
        """Whether all of its scores are there. Does not wait."""
        return self.engines.are_scored(self.parts)

    def places(self) -> list[tuple[int, ...]]:
        """Of the rollouts of each part."""
        ends = np.cumsum([0, *(part.num_rollouts for part in self.parts)]).tolist()
        return [self.scored_places[start:end] for start, end in itertools.pairwise(ends)]


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The rollouts that a step learns from, and where their payload is; statistics, selection and learner read this.

    Their tokens stand one after another, in this order, in every tensor [T] of the step.
    """

    rollouts: tuple[Rollout, ...]  # R, at least one
    tokens: TokenStats  # of the T tokens, from what the engines returned
    payloads: tuple[Payload, ...]  # P
    payload_R: np.ndarray  # int64 [R], which payload has the rollout
    first_R: np.ndarray  # int64 [R], where its tokens begin in that payload
    num_candidates: int = 0  # of a token, at most
    num_same_first: int = 0  # tokens at which the likeliest event of both models is the same
    dropped: Counter[str] = field(default_factory=Counter)  # rollouts that are left out, by reason
    num_generated: int = 0  # tokens of all rollouts of the step, those left out included
    num_scored: int = 0  # tokens for which the teacher gave scores, NaN or not

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 [R + 1]: the tokens of rollout r stand at bounds[r] .. bounds[r + 1] - 1; the last is T."""
        return np.cumsum([0, *map(len, self.rollouts)])

    @property
    def num_tokens(self) -> int:
        return int(self.bounds[-1])

    def release(self) -> None:
        """Nobody asks for the payload any more."""
        for payload in self.payloads:
            payload.drop()


def scored_batch(pending: Sequence[PendingScores]) -> StepBatch:
    """Waits for all scores. Without the rollouts that have none, and those with a NaN score: these are counted.

    In the order of the places, whenever the scores came. Raises StageError where nothing is left, and where a teacher's
    scores cannot be those of the tokens that it was asked about.
    """
    rollouts = {place: rollout for group in pending for place, rollout in group.rollouts.items()}
    found = placed_parts(pending)
    missing = dict.fromkeys(rollouts.keys() - {place for each in found for place in each.places}, FOREIGN)
    missing |= {each.places[number]: why for each in found for number, why in each.part.missing.items()}
    dropped = Counter(foreign_token=0, nan_score=0)
    dropped.update(why.reason for why in missing.values())
    if len(missing) == len(rollouts):
        said = next((f"; the teacher said: {why.said}" for why in missing.values() if why.said), "")
        raise StageError(
            f"score: none of {len(rollouts)} rollouts can be used: {dropped['foreign_token']} hold a token outside the "
            f"shared vocabulary, {dropped['nan_score']} have NaN in the teacher's scores, "
            f"{dropped['teacher_refused']} were refused by it, {dropped['teacher_error']} it failed on{said}"
        )
    known = [each for each in found if each.part.stats]
    _require_preferences(known)
    asked_in_vain = sum(len(rollouts[place]) for place, why in missing.items() if why.reason != NAN.reason)
    num_generated = sum(map(len, rollouts.values()))
    return StepBatch(
        **_in_order(rollouts, [each.usable for each in known], [each.part for each in known]),
        payloads=tuple(each.payload for each in known if each.payload is not None),
        dropped=dropped,
        num_generated=num_generated,
        num_scored=num_generated - asked_in_vain,
    )


def placed_parts(pending: Sequence[PendingScores]) -> list[PlacedPart]:
    """What all engines say of the rollouts that they were given, each asked once. Waits for them."""
    found = []
    for engines in {id(group.engines): group.engines for group in pending}.values():
        groups = [group for group in pending if group.engines is engines]
        parts = [part for group in groups for part in group.parts]
        places = [own for group in groups for own in group.places()]
        for numbers, part, payload in engines.scores(parts):
            own = tuple(place for number in numbers for place in places[number])
            found.append(PlacedPart(groups[0].teacher, own, part, payload))
    return found


def _require_preferences(found: Sequence[PlacedPart]) -> None:
    """Raises StageError for a teacher that says the same of every token of the step."""
    flat: dict[str, list[str]] = {}
    for each in found:
        flat.setdefault(each.teacher, []).append(each.part.flat)
    for said in flat.values():
        if all(said):
            raise StageError(said[0])


def _in_order(rollouts: dict[int, Rollout], usable: list[list[int]], parts: list[ScoredPart]) -> dict[str, Any]:
    """The usable rollouts by place with their statistics, and which part has each from which token on.

    `usable`: the places of each part's rollouts.
    """
    places = np.concatenate(usable)
    payload = np.repeat(np.arange(len(parts)), [len(each) for each in usable])
    length = np.array([len(rollouts[place]) for place in places.tolist()])
    start = np.cumsum(length) - length  # in the parts one after another
    first = start - start[np.cumsum([0, *map(len, usable)])[:-1]][payload]
    order = np.argsort(places)
    return {
        "rollouts": tuple(rollouts[place] for place in places[order].tolist()),
        "tokens": _stats([part.stats for part in parts], payload[order], first[order], length[order]),
        "payload_R": payload[order],
        "first_R": first[order],
        "num_candidates": max(part.num_candidates for part in parts),
        "num_same_first": sum(part.num_same_first for part in parts),
    }


def _stats(
    parts: list[dict[str, np.ndarray]], part_R: np.ndarray, first_R: np.ndarray, length_R: np.ndarray
) -> TokenStats:
    """Of rollouts in this order, each from its part; one statistic at a time, so that none is there twice."""
    found = {}
    where = list(zip(part_R.tolist(), first_R.tolist(), length_R.tolist(), strict=True))
    for name in common_names(parts):
        columns = [part[name] for part in parts]
        values = np.concatenate([columns[part][first : first + length] for part, first, length in where])
        found[name] = torch.from_numpy(values)
    return TokenStats.of(found)


def ranges(start_R: np.ndarray, length_R: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., of each range its length, one range after another. int64."""
    ends = np.cumsum(length_R)
    return np.repeat(start_R - (ends - length_R), length_R) + np.arange(ends[-1] if len(ends) else 0)


def held_here(items: Sequence[ScoredRollout], vocabulary: Vocabulary) -> StepBatch:
    """These rollouts as a batch whose payload is in this process."""
    scored, places = ScoredBatch(items=tuple(items)), list(range(len(items)))
    return StepBatch(
        **_in_order(dict(enumerate(scored.rollouts)), [places], [described(scored, vocabulary)]),
        payloads=(KeptHere(scored, vocabulary),),
    )


def batch_stats(
    step: int, batch: StepBatch | ScoredBatch, tokens: TokenStats, reward_R: Tensor | None, *, num_steps: int
) -> BatchStats:
    """The batch as the selection sees it; `tokens` and `reward_R` are those of `batch`, in order."""
    rollouts = batch.rollouts
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
