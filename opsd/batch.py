"""From rollouts and scores to the global batch that the selection sees."""

from __future__ import annotations

from collections import Counter

from opsd.errors import StageError
from opsd.ops.align import token_stats
from opsd.types import BatchStats, Rollout, ScoredRollout, TeacherScores, TokenStats, Vocabulary


def drop_foreign(rollouts: list[Rollout], vocabulary: Vocabulary) -> tuple[list[Rollout], Counter[str]]:
    """Without the rollouts that hold a token outside the shared vocabulary (a padded id, which the teacher may lack)."""
    kept = [r for r in rollouts if int(r.response_ids.max()) < vocabulary.size]
    return kept, Counter(foreign_token=len(rollouts) - len(kept))


def join(rollouts: list[Rollout], scores: list[TeacherScores]) -> tuple[list[ScoredRollout], Counter[str]]:
    """Each rollout with its scores; those with a NaN score are left out and counted. Raises StageError where none is left."""
    scored = [
        ScoredRollout(rollout=rollout, scores=own)
        for rollout, own in zip(rollouts, scores, strict=True)
        if not own.has_nan()
    ]
    if not scored:
        raise StageError(f"score: all {len(rollouts)} rollouts of this step have NaN in the teacher's scores")
    return scored, Counter(nan_score=len(rollouts) - len(scored))


def rollout_stats(scored: list[ScoredRollout], vocabulary: Vocabulary) -> TokenStats:
    """The statistics of all rollouts' tokens, one after another, from what the engines returned: no forward pass."""
    return TokenStats.concatenate([token_stats(item.rollout, item.scores, vocabulary) for item in scored])


def batch_stats(step: int, scored: list[ScoredRollout], tokens: TokenStats) -> BatchStats:
    """The global batch of a step; `tokens` are those of `scored`, in order."""
    return BatchStats(step=step, lengths=tuple(len(item.rollout) for item in scored), tokens=tokens)
