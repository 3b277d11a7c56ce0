"""What a step's trajectories were: turns, calls and what came of them, and the text that tools put between turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from opsd.sequences import ENDS
from opsd.types import Rollout


def tool_metrics(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Of one step; nothing where the run has no tools.

    `tools/token_share`: of all tokens that models read behind the prompts, those that the student did not write.
    `tools/failed/*`: calls by what went wrong (opsd.agents.tools.FAILURES), those that occurred alone.
    """
    trajectories = [rollout.trajectory for rollout in rollouts if rollout.trajectory is not None]
    if not trajectories:
        return {}
    turns = [each.num_turns for each in trajectories]
    num_read = sum(len(each.read_ids) for each in trajectories)
    failures: Counter[str] = Counter()
    for each in trajectories:
        failures.update(each.failures)
    ends = Counter(each.end for each in trajectories)
    return {
        "tools/trajectories": len(trajectories),
        "tools/turns": float(np.mean(turns)),
        "tools/turns_max": max(turns),
        "tools/token_share": 1 - sum(len(each.place_T) for each in trajectories) / num_read,
        "tools/calls": sum(each.num_calls for each in trajectories),
        "tools/failed": failures.total(),
        **{f"tools/failed/{kind}": count for kind, count in sorted(failures.items())},
        **{f"tools/ended/{end}": ends[end] for end in ENDS},
    }


def between_texts(rollout: Rollout, tokenizer: Any) -> list[tuple[int, str]]:
    """(number of the student's token before which it stands, text) of what tools and template put between turns."""
    if rollout.trajectory is None:
        return []
    read_ids, place_T = rollout.read_ids, rollout.place_T
    firsts = rollout.trajectory.turn_starts[1:]
    return [(first, tokenizer.decode(read_ids[place_T[first - 1] + 1 : place_T[first]])) for first in firsts]
