"""How good the student is: greedy accuracy on held-out problems, and its distance from the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opsd.batch import scored_batch
from opsd.data.grading import judge_rollouts
from opsd.rollout import RolloutPool
from opsd.teacher.router import Teacher
from opsd.types import Prompt, Rollout


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy over greedy answers; the rest over answers sampled at the rollout's temperature."""

    accuracy: float | None = None  # None: no grader or no problems
    # Nats per token: mean of log student(y) - log teacher(y), an unbiased estimate at temperature 1. None, as the next
    # three: no prompts for it.
    reverse_kl: float | None = None
    top1_agreement: float | None = None  # share of tokens at which both models' likeliest event is the same
    response_length: float | None = None  # tokens, of the sampled answers
    truncated: float | None = None  # share of the sampled answers that hit the length limit
    grader_timeouts: int | None = None  # greedy answers that the grader gave up, as wrong; None: as accuracy
    # Sampled answers without usable scores of the teacher, by reason: in no figure but their number.
    dropped: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, float | None]:
        """By name, as metrics.jsonl and summary.json have them."""
        reasons = {f"dropped/{reason}": count for reason, count in self.dropped.items()}
        return {name: value for name, value in vars(self).items() if name != "dropped"} | reasons

    def metrics(self) -> dict[str, float | None]:
        return {f"eval/{name}": value for name, value in self.figures().items()}


def evaluate(
    rollout_pool: RolloutPool,
    teacher_pool: Teacher,
    *,
    problems: list[Prompt],
    kl_prompts: list[Prompt],
    grader: str | None,
    tokenizer: Any,
) -> Evaluation:
    """The current student on held-out prompts. The sampled answers use the same seeds at every call."""
    right, timeouts = None, None
    if grader is not None and problems:
        right, timeouts = accuracy(rollout_pool.greedy(problems), grader, tokenizer)
    if not kl_prompts:
        return Evaluation(accuracy=right, grader_timeouts=timeouts)
    scored = scored_batch(teacher_pool.begin(rollout_pool.sample(kl_prompts, samples_per_prompt=1, step=-1)))
    scored.release()
    student_T, teacher_T = scored.tokens.student_logprob_T, scored.tokens.teacher_logprob_T
    assert student_T is not None and teacher_T is not None, "the engines know both"
    return Evaluation(
        accuracy=right,
        reverse_kl=float((student_T - teacher_T).numpy().mean()),
        top1_agreement=scored.num_same_first / scored.num_tokens,
        response_length=float(np.mean([len(rollout) for rollout in scored.rollouts])),
        truncated=float(np.mean([not rollout.stopped for rollout in scored.rollouts])),
        grader_timeouts=timeouts,
        dropped=dict(scored.dropped),
    )


def accuracy(rollouts: list[Rollout], grader: str, tokenizer: Any) -> tuple[float, int]:
    """Share of the answers that the grader accepts, or their mean score, and how many it gave up."""
    judged = judge_rollouts(rollouts, grader, tokenizer)
    return float(np.mean([answer.reward for answer in judged])), sum(answer.gave_up for answer in judged)
