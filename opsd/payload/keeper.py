"""The payload of a step stays where it was scored: who keeps it says what is known of it, and hands out kept rows."""
# T response tokens, N kept tokens

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from opsd.errors import common_names
from opsd.ops.signals import Statistics
from opsd.payload.kept import KeptRows, Wanted, kept_rows
from opsd.payload.scored import ScoredBatch, agreement_sums, rollout_stats
from opsd.score_checks import check_scores, flat_scores
from opsd.types import NoScores, Rollout, ScoredRollout, TeacherScores, Vocabulary

NAN = NoScores(reason="nan_score")


@dataclass(frozen=True, kw_only=True)
class ScoredPart:
    """What the driver is told of rollouts that were scored. The usable ones' tokens stand one after another."""

    num_rollouts: int  # that were to be scored
    missing: dict[int, NoScores] = field(default_factory=dict)  # by number among them: why they cannot be learnt from
    stats: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [T] each, by the names of TokenStats
    num_candidates: int = 0  # of a token, at most
    num_same_first: int = 0  # tokens at which the likeliest event of both models is the same
    flat: str = ""  # what is wrong where the teacher says the same of every token; empty: it does not


class Payload(Protocol):
    """Where the usable rollouts of a ScoredPart are kept, for the driver. Places are those in the part's tokens."""

    def rows(self, places: Sequence[np.ndarray], wanted: Wanted) -> Sequence[Any]:
        """For each of the ranks the KeptRows at its places, or a reference to them. Does not wait."""
        ...

    def close(self, index_N: np.ndarray) -> Callable[[], dict[str, float]]:
        """Keeps it no longer, after all that was asked before, and sums up: the call waits for `agreement_sums`."""
        ...

    def whole(self) -> ScoredBatch:
        """All of it, in this process: for who looks at a few rollouts."""
        ...

    def drop(self) -> None:
        """As `close`, and nothing is summed up."""
        ...


class Told(NamedTuple):
    """What engines say of parts of their work, which they keep together."""

    numbers: Sequence[int]  # which parts, in order
    part: ScoredPart  # of all of their rollouts, one after another
    payload: Payload | None  # None: there is nothing to learn from


def looked_through(
    teacher: str,
    rollouts: Sequence[Rollout],
    scores: Sequence[TeacherScores | NoScores],
    vocabulary: Vocabulary,
    statistics: Statistics | None = None,
) -> tuple[ScoredPart, ScoredBatch | None]:
    """What the driver is told, and the rollouts that can be learnt from; None where there is none.

    `teacher`: its folder or addresses, for messages. Raises StageError for scores that cannot be those of these tokens.
    """
    missing: dict[int, NoScores] = {}
    usable = []
    for number, (rollout, found) in enumerate(zip(rollouts, scores, strict=True)):
        if isinstance(found, NoScores):
            missing[number] = found
        elif found.has_nan():
            missing[number] = NAN
        else:
            usable.append(ScoredRollout(rollout=rollout, scores=found))
    if not usable:
        return ScoredPart(num_rollouts=len(rollouts), missing=missing), None
    check_scores(teacher, usable, vocabulary)
    scored = ScoredBatch(items=tuple(usable))
    part = described(scored, vocabulary, statistics)
    flat = flat_scores(teacher, usable, vocabulary)
    return replace(part, num_rollouts=len(rollouts), missing=missing, flat=flat), scored


def described(scored: ScoredBatch, vocabulary: Vocabulary, statistics: Statistics | None = None) -> ScoredPart:
    """What the driver is told of rollouts that can all be learnt from."""
    same = [item.rollout.candidate_ids[:, :1] == item.scores.top_ids[:, :1] for item in scored.items]
    stats = rollout_stats(scored, vocabulary, statistics)
    return ScoredPart(
        num_rollouts=len(scored.items),
        stats={name: value_T.numpy() for name, value_T in stats.known().items()},
        num_candidates=scored.num_candidates,
        num_same_first=sum(int(same_T1.sum()) for same_T1 in same),
    )


def in_one(found: Sequence[tuple[ScoredPart, ScoredBatch | None]]) -> tuple[ScoredPart, ScoredBatch | None]:
    """Parts as one, their rollouts one after another."""
    parts = [part for part, _ in found]
    items = [item for _, scored in found if scored is not None for item in scored.items]
    known = [part for part in parts if part.stats]
    start_P = np.cumsum([0, *(part.num_rollouts for part in parts)]).tolist()
    whole = ScoredPart(
        num_rollouts=start_P[-1],
        missing={s + n: why for s, part in zip(start_P, parts, strict=False) for n, why in part.missing.items()},
        stats={n: np.concatenate([part.stats[n] for part in known]) for n in common_names([p.stats for p in known])},
        num_candidates=max((part.num_candidates for part in known), default=0),
        num_same_first=sum(part.num_same_first for part in known),
        flat=known[0].flat if all(part.flat for part in known) and known else "",
    )
    return whole, ScoredBatch(items=tuple(items)) if items else None


class KeptHere:
    """A Payload in this process."""

    def __init__(self, scored: ScoredBatch, vocabulary: Vocabulary) -> None:
        self.scored, self.vocabulary = scored, vocabulary

    def rows(self, places: Sequence[np.ndarray], wanted: Wanted) -> list[KeptRows]:
        return [kept_rows(self.scored, index_N, wanted, self.vocabulary) for index_N in places]

    def close(self, index_N: np.ndarray) -> Callable[[], dict[str, float]]:
        return partial(agreement_sums, self.scored, index_N, self.vocabulary)

    def whole(self) -> ScoredBatch:
        return self.scored

    def drop(self) -> None:
        """Whoever holds this holds the payload."""


class Keeper:
    """What an actor keeps of what it has scored, by the keys under which its driver knows it.

    What was scored is looked through in a thread of its own, while the actor goes on. The calls from `told` to `drop`
    may be made in another thread than `keep`.
    """

    def __init__(self) -> None:
        self._looking = ThreadPoolExecutor(1, "payload")
        # What nobody has asked for yet, and the vocabulary that it is about.
        self._found: dict[int, tuple[Future[tuple[ScoredPart, ScoredBatch | None]], Vocabulary]] = {}
        self._kept: dict[int, KeptHere] = {}

    def keep(
        self,
        key: int,
        teacher: str,
        rollouts: Sequence[Rollout],
        scores: Sequence[TeacherScores | NoScores],
        vocabulary: Vocabulary,
        statistics: Statistics | None,
    ) -> None:
        """Arguments as of `looked_through`. Does not wait."""
        found = self._looking.submit(looked_through, teacher, rollouts, scores, vocabulary, statistics)
        self._found[key] = found, vocabulary

    def told(self, keys: list[int]) -> ScoredPart:
        """What the driver is told of these scores; what can be learnt from is kept by the first key until `drop`."""
        found = [self._found.pop(key) for key in keys]
        part, scored = in_one([looked.result() for looked, _ in found])
        if scored is not None:
            self._kept[keys[0]] = KeptHere(scored, found[0][1])
        return part

    def rows(self, key: int, places: Sequence[np.ndarray], wanted: Wanted) -> list[KeptRows] | KeptRows:
        """As Ray wants them: an object for each of the places, and one by itself is no list."""
        found = self._kept[key].rows(places, wanted)
        return found if len(found) > 1 else found[0]

    def close(self, key: int, index_N: np.ndarray) -> dict[str, float]:
        return self._kept.pop(key).close(index_N)()

    def whole(self, key: int) -> ScoredBatch:
        return self._kept[key].whole()

    def drop(self, key: int) -> None:
        self._kept.pop(key, None)

    def num_kept(self) -> int:
        """Parts whose payload is here."""
        return len(self._found) + len(self._kept)
