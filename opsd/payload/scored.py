"""Rollouts with their scores, in the process that has both: statistics of their tokens, and sums for the log."""
# R rollouts, T response tokens of all of them, N kept tokens

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from opsd.ops.align import TokenRows, token_stats
from opsd.ops.overlap import TopFigures, top_figures
from opsd.ops.signals import Statistics
from opsd.types import Rollout, ScoredRollout, TokenStats, Vocabulary


@dataclass(frozen=True, kw_only=True)
class ScoredBatch:
    """Rollouts, each with its scores. Their tokens stand one after another, in this order, in every array [T]."""

    items: tuple[ScoredRollout, ...]  # R, at least one

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

    @property
    def num_candidates(self) -> int:
        """Of a token, at most."""
        return max(rollout.candidate_ids.shape[1] for rollout in self.rollouts)


def rollout_stats(scored: ScoredBatch, vocabulary: Vocabulary, statistics: Statistics | None = None) -> TokenStats:
    """The statistics of all tokens, from what the engines returned: no forward pass."""
    groups = TokenRows.in_groups(scored.items, vocabulary)
    return TokenStats.concatenate([token_stats(rows, vocabulary, statistics) for rows in groups])


def agreement_sums(scored: ScoredBatch, index_N: np.ndarray, vocabulary: Vocabulary) -> dict[str, float]:
    """Each of `top_figures` summed over the tokens at which it is known, and as kept_* over those at `index_N`."""
    groups = [top_figures(rows, vocabulary) for rows in TokenRows.in_groups(scored.items, vocabulary)]
    figures = {name: np.concatenate([vars(group)[name] for group in groups]) for name in vars(groups[0])}
    kept = {name: values_T[index_N] for name, values_T in figures.items()}
    sums = {"": _sums(TopFigures(**figures)), "kept_": _sums(TopFigures(**kept))}
    return {prefix + name: value for prefix, each in sums.items() for name, value in each.items()}


def _sums(figures: TopFigures) -> dict[str, float]:
    known_T = figures.known_T
    return {name.removesuffix("_T"): float(values_T[known_T].sum()) for name, values_T in vars(figures).items()}
