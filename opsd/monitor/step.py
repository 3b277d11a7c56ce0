"""What a step made, as numbers for metrics.jsonl and as rows for the report's token view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsd.batch import PendingScores, StepBatch
from opsd.monitor.collapse import repetition
from opsd.monitor.tools import between_texts, tool_metrics
from opsd.ops.quadrants import quadrants
from opsd.types import BatchStats, Rollout, Selection, StepReport


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What a step made, from its rollouts to its update: for the log, the token view and the run's counts."""

    batch: BatchStats
    scored: StepBatch  # whose tokens `batch` describes
    selection: Selection
    report: StepReport
    queue: dict[str, int]  # what waited for its scores, see `queue_lengths`
    graded: dict[str, int]  # what is counted of the grading; empty without a grader


def queue_lengths(pending: Sequence[PendingScores]) -> dict[str, int]:
    """What waits for its scores now. With a long score phase, a long queue means too few teachers."""
    waiting = [len(group.rollouts) for group in pending if not group.is_scored()]
    return {"queue/rollouts": sum(waiting), "queue/groups": len(waiting)}


def step_metrics(record: StepRecord, phase_s: dict[str, float], *, weight_version: int) -> dict[str, float | None]:
    """What metrics.jsonl has of one step. Shares are of the step's response tokens.

    `named_mass`: the student's mean mass on the tokens on which reverse_kl compares the two models. `repetition`: see
    opsd.monitor.collapse. The loss of a step that was skipped may be NaN.

    `weight_version`: optimiser steps that the rollout engines' weights have seen after the step.
    """
    batch, report, dropped = record.batch, record.report, record.scored.dropped
    rollouts = record.scored.rollouts
    num_tokens = len(batch.tokens)
    return {
        "loss": report.loss,
        "reverse_kl": float(batch.tokens.reverse_kl_T.mean()),
        "entropy": float(batch.tokens.entropy_T.mean()),
        "named_mass": None if batch.tokens.named_mass_T is None else float(batch.tokens.named_mass_T.mean()),
        "kept_ratio": len(record.selection) / num_tokens,
        "num_tokens": num_tokens,
        "num_kept": report.num_kept,
        "num_trunk_tokens": report.num_trunk_tokens,
        "response_length": float(np.mean(batch.lengths)),
        "truncated": float(np.mean([not r.stopped for r in rollouts])),
        "repetition": repetition(rollouts),
        "accuracy_train": None if batch.reward_R is None else float(batch.reward_R.mean()),
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "weight_version": weight_version,
        **staleness(batch.step, rollouts),
        "dropped": dropped.total(),
        **{f"dropped/{reason}": count for reason, count in dropped.items()},
        **quadrant_shares(batch, record.selection),
        **tool_metrics(rollouts),
        "tokens_per_s": num_tokens / sum(phase_s[name] for name in ("rollout", "score", "select", "learn", "sync")),
        **{f"phase_s/{name}": seconds for name, seconds in phase_s.items()},
        **record.queue,
        **record.graded,
    }


def staleness(step: int, rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Optimiser steps between the weights that drew a token and those that learn from it in `step`: mean and largest.

    Over the tokens of the student's own answers; None where there is none. 0 in a synchronous loop. `mixed_versions`:
    the share of these answers that went on under new weights, see schedule.partial_rollouts.
    """
    own = [rollout for rollout in rollouts if rollout.policy_version >= 0]
    if not own:
        return dict.fromkeys(("staleness", "staleness_max", "mixed_versions"))
    steps_T = step - np.concatenate([rollout.version_T for rollout in own])
    return {
        "staleness": float(steps_T.mean()),
        "staleness_max": int(steps_T.max()),
        "mixed_versions": float(np.mean([rollout.token_versions is not None for rollout in own])),
    }


def quadrant_shares(batch: BatchStats, selection: Selection) -> dict[str, float | None]:
    """quadrant_1..4: share of the tokens; kept_quadrant_1..4: share of that quadrant that is kept, None where empty."""
    quadrant_T = quadrants(batch.tokens.entropy_T, batch.tokens.reverse_kl_T)
    in_all = torch.bincount(quadrant_T, minlength=5).tolist()
    in_kept = torch.bincount(quadrant_T[selection.index_N], minlength=5).tolist()
    shares: dict[str, float | None] = {f"quadrant_{q}": in_all[q] / len(quadrant_T) for q in range(1, 5)}
    for q in range(1, 5):
        shares[f"kept_quadrant_{q}"] = in_kept[q] / in_all[q] if in_all[q] else None
    return shares


def token_rows(record: StepRecord, num_rollouts: int, tokenizer: Any) -> list[dict[str, Any]]:
    """The first rollouts of a step, one row each, for the token view."""
    batch, selection, rollouts = record.batch, record.selection, record.scored.rollouts
    weight_T = torch.zeros(len(batch.tokens)).index_copy(0, selection.index_N, selection.weight_N.float())
    quadrant_T = quadrants(batch.tokens.entropy_T, batch.tokens.reverse_kl_T)
    correct = [None] * len(rollouts) if batch.reward_R is None else batch.reward_R.bool().tolist()
    rows = []
    for number, rollout in enumerate(rollouts[:num_rollouts]):
        own = slice(*record.scored.bounds[number : number + 2])
        rows.append(
            {
                "step": batch.step + 1,
                "prompt": rollout.prompt.text,
                "answer": rollout.prompt.answer,
                "correct": correct[number],
                "stopped": rollout.stopped,
                "tokens": token_texts(rollout, tokenizer),
                "entropy": _rounded(batch.tokens.entropy_T[own]),
                "reverse_kl": _rounded(batch.tokens.reverse_kl_T[own]),
                "quadrant": quadrant_T[own].tolist(),
                "weight": _rounded(weight_T[own]),
                "between": between_texts(rollout, tokenizer),
            }
        )
    return rows


def token_texts(rollout: Rollout, tokenizer: Any) -> list[str]:
    """Each token as text by itself (a multi-byte character split over tokens shows as replacement signs)."""
    return [tokenizer.decode([token]) for token in rollout.response_ids.tolist()]


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]
