"""From rollouts and scores to the global batch that the selection sees."""

from __future__ import annotations

from collections import Counter

import torch

from opsd.errors import StageError
from opsd.ops.align import token_stats
from opsd.types import BatchStats, Rollout, ScoredRollout, TeacherScores, TokenStats, Vocabulary


def drop_foreign(rollouts: list[Rollout], vocabulary: Vocabulary) -> tuple[list[Rollout], Counter[str]]:
    """Without the rollouts that hold a token outside the shared vocabulary (a padded id; the teacher may lack it)."""
    kept = [r for r in rollouts if int(r.response_ids.max()) < vocabulary.size]
    return kept, Counter(foreign_token=len(rollouts) - len(kept))


def join(
    rollouts: list[Rollout], scores: list[TeacherScores], vocabulary: Vocabulary
) -> tuple[list[ScoredRollout], Counter[str]]:
    """Each rollout with its scores; those with a NaN score are left out and counted.

    Raises StageError where none is left.
    """
    scored = [
        ScoredRollout(rollout=rollout, scores=own, stats=token_stats(rollout, own, vocabulary))
        for rollout, own in zip(rollouts, scores, strict=True)
        if not own.has_nan()
    ]
    if not scored:
        raise StageError(f"score: all {len(rollouts)} rollouts of this step have NaN in the teacher's scores")
    return scored, Counter(nan_score=len(rollouts) - len(scored))


def batch_stats(step: int, scored: list[ScoredRollout]) -> BatchStats:
    """The statistics of all rollouts, one after another."""
    return BatchStats(
        step=step,
        lengths=tuple(len(item.rollout) for item in scored),
        tokens=TokenStats(
            **{
                name: torch.cat([getattr(item.stats, name) for item in scored])
                for name in ("entropy_T", "reverse_kl_T", "forward_kl_T")
            }
        ),
    )
