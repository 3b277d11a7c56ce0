"""From rollouts and scores to the global batch that the selection sees."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from opsd.errors import StageError
from opsd.ops.align import TokenRows, token_stats
from opsd.ops.signals import Statistics
from opsd.types import BatchStats, NoScores, Rollout, ScoredRollout, TeacherScores, TokenStats, Vocabulary


def drop_unusable(
    answered: list[tuple[Rollout, TeacherScores | NoScores]],
) -> tuple[list[ScoredRollout], Counter[str]]:
    """Without the rollouts that have no scores, and those with a NaN score.

    What is left out is counted by reason. Raises StageError where nothing is left.
    """
    without = [scores for _, scores in answered if isinstance(scores, NoScores)]
    known = [ScoredRollout(rollout=r, scores=scores) for r, scores in answered if not isinstance(scores, NoScores)]
    scored = [item for item in known if not item.scores.has_nan()]
    dropped = Counter(foreign_token=0, nan_score=len(known) - len(scored))
    dropped.update(each.reason for each in without)
    if not scored:
        said = "".join(f"; the teacher said: {each.said}" for each in [e for e in without if e.said][:1])
        raise StageError(
            f"score: none of {len(answered)} rollouts can be used: {dropped['foreign_token']} hold a token outside the "
            f"shared vocabulary, {dropped['nan_score']} have NaN in the teacher's scores, "
            f"{dropped['teacher_refused']} were refused by it, {dropped['teacher_error']} it failed on{said}"
        )
    return scored, dropped


def rollout_stats(
    scored: list[ScoredRollout], vocabulary: Vocabulary, statistics: Statistics | None = None
) -> TokenStats:
    """The statistics of all rollouts' tokens, one after another, from what the engines returned: no forward pass."""
    groups = TokenRows.in_groups(scored, vocabulary)
    return TokenStats.concatenate([token_stats(rows, vocabulary, statistics) for rows in groups])


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
