"""Which tokens may be selected at all: whole rollouts or ends of rollouts are set aside before a score counts.

    FILTERS[name](batch, **options) -> bool [T], True: may be selected

`READS` says which statistics of the tokens each is made of, as that of tip.scores.
`filters={horizon: {start: 64, end: 512}}` turns one on; several must all agree.
"""
# T response tokens of the global batch, R rollouts

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from opsd.types import BatchStats
from tip.per_rollout import mean_per_rollout
from tip.scores import known


def fire(batch: BatchStats, *, drop: float = 0.2) -> Tensor:
    """Leaves out rollouts below the `drop` quantile of the mean log-probability that the teacher gives their tokens.

    Of the whole batch, and linear between two rollouts, so that of R rollouts ceil(drop (R - 1)) go: one of two to six
    at 0.2, none of one. Rollouts at the quantile stay. Source: FiRe, arXiv 2606.02684, YuYingLi0/FiRe-OPD,
    verl/workers/actor/dp_actor.py (`traj_skip_percentile`); its weights are `adjust.fire`.
    """
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop must be in [0, 1), got {drop}")
    mean_R = mean_per_rollout(batch, known(batch.tokens, "teacher_logprob_T"))
    return (mean_R >= mean_R.quantile(drop))[batch.rollout_T]


def horizon(batch: BatchStats, *, start: int, end: int) -> Tensor:
    """Only the first H response tokens of each rollout, H going evenly from `start` to `end`, first step to last.

    A control of our own, beside the prefixes of Prefix OPD, arXiv 2602.15260. A run of one step has `end`.
    """
    if not 1 <= start <= end:
        raise ValueError(f"need 1 <= start <= end, got {start} and {end}")
    share = batch.step / (batch.num_steps - 1) if batch.num_steps > 1 else 1.0
    return batch.position_T < round(start + (end - start) * share)


FILTERS: dict[str, Callable[..., Tensor]] = {"fire": fire, "horizon": horizon}

READS: dict[str, tuple[str, ...]] = {"fire": ("teacher_logprob_T",), "horizon": ()}
