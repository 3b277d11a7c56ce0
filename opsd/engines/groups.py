"""Work divided among engines or passes, and its results put back in order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

from opsd.types import Rollout, TeacherScores


def in_order(groups: Iterable[dict[int, Rollout]]) -> list[Rollout]:
    """All rollouts of the groups (place -> rollout), by place."""
    found = {place: rollout for group in groups for place, rollout in group.items()}
    return [found[place] for place in sorted(found)]


def score_in_groups(
    rollouts: list[Rollout], max_tokens: int, score_group: Callable[[list[Rollout]], list[TeacherScores]]
) -> list[TeacherScores]:
    """`score_group` on groups of at most `max_tokens` prompt and response tokens; the results in the order given."""
    lengths = [num_read(rollout) for rollout in rollouts]
    scores: dict[int, TeacherScores] = {}
    for group in split_by_tokens(lengths, max_tokens):
        scores.update(zip(group, score_group([rollouts[index] for index in group]), strict=True))
    return [scores[index] for index in range(len(rollouts))]


def num_read(rollout: Rollout) -> int:
    """Tokens that a teacher reads to score it."""
    return len(rollout.prompt.scored_after) + len(rollout)


def split_by_tokens(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in groups of like lengths, each at most `max_tokens` when padded to its longest; a longer one alone."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def split_evenly(items: Sequence[Any], num_parts: int) -> list[Sequence[Any]]:
    """Contiguous parts whose sizes differ by at most one."""
    size, extra = divmod(len(items), num_parts)
    bounds = [part * size + min(part, extra) for part in range(num_parts + 1)]
    return [items[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


class TokensInFlight:
    """Which engine gets what, by the tokens that each has under way."""

    def __init__(self, num_engines: int) -> None:
        self.tokens = [0] * num_engines  # of each engine

    def split(self, sizes: Sequence[int]) -> list[range]:
        """Indices of the items for each engine, contiguous, so that all have as near the same as whole items allow.

        `sizes`: of the items, in tokens. They are under way until `done` says otherwise. The same calls split the same
        way: nothing depends on which engine is faster.
        """
        if not sizes:
            return [range(0)] * len(self.tokens)
        level = (sum(self.tokens) + sum(sizes)) / len(self.tokens)
        # An engine above the level gets nothing; then the others have more room than is needed, and a share of it.
        rooms = list(accumulate(max(0.0, level - tokens) for tokens in self.tokens))
        middles = [end - size / 2 for size, end in zip(sizes, accumulate(sizes), strict=True)]
        takers = [bisect_right(rooms, middle / sum(sizes) * rooms[-1]) for middle in middles]
        for taker, size in zip(takers, sizes, strict=True):
            self.tokens[taker] += size
        return [range(bisect_left(takers, n), bisect_right(takers, n)) for n in range(len(self.tokens))]

    def done(self, engine: int, num_tokens: int) -> None:
        self.tokens[engine] -= num_tokens
