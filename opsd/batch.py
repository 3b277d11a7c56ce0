"""From rollouts and scores to the global batch that the selection sees."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from opsd.errors import StageError
from opsd.ops.align import TokenRows, token_stats
from opsd.types import BatchStats, Rollout, ScoredRollout, TeacherScores, TokenStats, Vocabulary


def drop_unusable(
    answered: list[tuple[Rollout, TeacherScores | None]],
) -> tuple[list[ScoredRollout], Counter[str]]:
    """Without the rollouts that hold a token outside the shared vocabulary (no scores) and those with a NaN score.

    What is left out is counted by reason. Raises StageError where nothing is left.
    """
    foreign = sum(scores is None for _, scores in answered)
    known = [ScoredRollout(rollout=rollout, scores=scores) for rollout, scores in answered if scores is not None]
    scored = [item for item in known if not item.scores.has_nan()]
    if not scored:
        raise StageError(
            f"score: none of {len(answered)} rollouts can be used: {foreign} hold a token outside the shared "
            f"vocabulary, {len(known)} have NaN in the teacher's scores"
        )
    return scored, Counter(foreign_token=foreign, nan_score=len(known) - len(scored))


def rollout_stats(scored: list[ScoredRollout], vocabulary: Vocabulary) -> TokenStats:
    """The statistics of all rollouts' tokens, one after another, from what the engines returned: no forward pass."""
    return TokenStats.concatenate([token_stats(rows, vocabulary) for rows in TokenRows.in_groups(scored, vocabulary)])


def batch_stats(
    step: int, scored: list[ScoredRollout], tokens: TokenStats, reward_R: Tensor | None, *, num_steps: int
) -> BatchStats:
    """The global batch of a step; `tokens` and `reward_R` are those of `scored`, in order."""
    rollouts = [item.rollout for item in scored]
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
