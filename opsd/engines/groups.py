"""Work divided among engines or passes, and its results put back in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    lengths = [len(rollout.prompt.scored_after) + len(rollout) for rollout in rollouts]
    scores: dict[int, TeacherScores] = {}
    for group in split_by_tokens(lengths, max_tokens):
        scores.update(zip(group, score_group([rollouts[index] for index in group]), strict=True))
    return [scores[index] for index in range(len(rollouts))]


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
