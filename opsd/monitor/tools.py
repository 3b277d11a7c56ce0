"""What a step's trajectories were: turns, calls and what came of them, and the text that tools put between turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opsd.sequences import ENDS
from opsd.types import Rollout


class TrajectoryCounts(NamedTuple):
    """What a trajectory was, in numbers; see opsd.sequences.Trajectory."""

    num_turns: int
    num_calls: int
    failures: Mapping[str, int]
    end: str
    num_tokens: int  # that the student wrote
    num_read: int  # that models read behind the prompt


def tool_metrics(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Those of one step."""
    trajectories = [rollout.trajectory for rollout in rollouts if rollout.trajectory is not None]
    return {
        **trajectory_metrics(
            [
                TrajectoryCounts(
                    num_turns=each.num_turns,
                    num_calls=each.num_calls,
                    failures=each.failures,
                    end=each.end,
                    num_tokens=len(each.place_T),
                    num_read=len(each.read_ids),
                )
                for each in trajectories
            ]
        )
    }


def trajectory_metrics(trajectories: Sequence[TrajectoryCounts]) -> dict[str, float]:
    """Of all of these together; nothing where there are none, as without tools.

    `tools/token_share`: of all tokens that models read behind the prompts, those that the student did not write.
    `tools/failed/*`: calls by what went wrong (opsd.agents.tools.FAILURES), those that occurred alone.
    """
    if not trajectories:
        return {}
    turns = [each.num_turns for each in trajectories]
    num_read = sum(each.num_read for each in trajectories)
    failures: Counter[str] = Counter()
    for each in trajectories:
        failures.update(each.failures)
    ends = Counter(each.end for each in trajectories)
    return {
        "tools/trajectories": len(trajectories),
        "tools/turns": float(np.mean(turns)),
        "tools/turns_max": max(turns),
        "tools/token_share": 1 - sum(each.num_tokens for each in trajectories) / num_read,
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
