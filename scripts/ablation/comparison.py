"""The runs of one task side by side: every arm that has all seeds, and its differences from the baselines."""
# A arms, S seeds, P problems of a seed

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsd.errors import DataError
from scripts.ablation.arms import ARMS, BASELINE
from scripts.ablation.intervals import Difference, differences

Record = dict[str, Any]
PerProblem = Callable[[Record], np.ndarray]  # of a run, [P]
NUM_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Comparison:
    task: str
    seeds: list[int]  # those of the baseline
    runs: dict[str, list[Record]]  # by arm, in the order of ARMS; one for each seed, in order
    incomplete: list[str]  # arms that lack some seeds: in no table

    def against(self, base_of: Callable[[str], str | None], value: PerProblem) -> dict[str, Difference]:
        """By arm, its difference from the arm that `base_of` names; arms without one are left out."""
        bases = {arm: base_of(arm) for arm in self.runs}
        pairs = {arm: base for arm, base in bases.items() if base in self.runs and base != arm}
        if not pairs:
            return {}
        values = {arm: np.stack([value(run) for run in self.runs[arm]]) for arm in {*pairs, *pairs.values()}}
        found = differences(np.stack([values[arm] - values[base] for arm, base in pairs.items()]))
        return dict(zip(pairs, found, strict=True))

    def at_equal_tokens(self) -> dict[str, tuple[float, Difference]]:
        """By arm of fewer tokens: mean@8 of the baseline after as many trained tokens, and the arm's difference.

        The baseline's is linear between its evaluations, problem by problem.
        """
        arms = [arm for arm in self.runs if self.trained_share(arm) < 0.95]
        if not arms:
            return {}
        base_ASP = np.stack([
            [mean_at_tokens(base, final(run)["trained_tokens"]) for run, base in self.pairs(arm)] for arm in arms
        ])  # fmt: skip
        own_ASP = np.stack([[mean_at_8(run) for run in self.runs[arm]] for arm in arms])
        found = differences(own_ASP - base_ASP)
        return {
            arm: (float(base_ASP[place].mean()), each)
            for place, (arm, each) in enumerate(zip(arms, found, strict=True))
        }

    def pairs(self, arm: str) -> list[tuple[Record, Record]]:
        """(its run, the baseline's) of each seed."""
        return list(zip(self.runs[arm], self.runs[BASELINE], strict=True))

    def trained_share(self, arm: str) -> float:
        """Trained tokens over those of the baseline."""
        return float(
            np.mean([final(run)["trained_tokens"] / final(base)["trained_tokens"] for run, base in self.pairs(arm)])
        )

    def mean(self, arm: str, value: Callable[[Record], float]) -> float:
        return float(np.mean([value(run) for run in self.runs[arm]]))


def comparison(task: str, records: list[Record]) -> Comparison:
    """Raises DataError where the task's runs lack the baseline, or were measured on different problems or steps."""
    of_task = {(each["arm"], each["seed"]): each for each in records if each["task"] == task}
    seeds = sorted(seed for arm, seed in of_task if arm == BASELINE)
    if not seeds:
        raise DataError(f"raw/{task}.jsonl: the arm {BASELINE} is missing, with which all others are compared")
    arms = [arm for arm in ARMS if any(name == arm for name, _ in of_task)]
    complete = [arm for arm in arms if all((arm, seed) in of_task for seed in seeds)]
    for seed in seeds:
        for arm in complete:
            _require_like(of_task[arm, seed], of_task[BASELINE, seed])
    return Comparison(
        task=task,
        seeds=seeds,
        runs={arm: [of_task[arm, seed] for seed in seeds] for arm in complete},
        incomplete=[arm for arm in arms if arm not in complete],
    )


def _require_like(run: Record, base: Record) -> None:
    """The same start, problems and evaluations."""
    first, base_first = run["evaluations"][0], base["evaluations"][0]
    steps, base_steps = ([each["step"] for each in one["evaluations"]] for one in (run, base))
    if steps != base_steps or first["samples"] != base_first["samples"]:
        raise DataError(
            f"raw/{run['task']}.jsonl: {run['arm']} and {base['arm']} with seed {run['seed']} must start from one "
            f"student and be evaluated at the same steps, got steps {steps} and {base_steps}"
        )


def final(run: Record) -> Record:
    return run["evaluations"][-1]


def mean_at_8(run: Record) -> np.ndarray:
    return digits(final(run)["samples"]) / NUM_SAMPLES


def reverse_kl(run: Record) -> np.ndarray:
    return np.array(final(run)["kl"])


def area(run: Record) -> np.ndarray:
    """The mean of mean@8 over the run's steps, by problem: the area under its curve."""
    steps = [each["step"] for each in run["evaluations"]]
    values = [digits(each["samples"]) / NUM_SAMPLES for each in run["evaluations"]]
    return np.trapezoid(np.stack(values), steps, axis=0) / steps[-1]


def mean_at_tokens(run: Record, num_tokens: float) -> np.ndarray:
    """mean@8 by problem after so many trained tokens, linear between evaluations; beyond the last, the last."""
    tokens = [each["trained_tokens"] for each in run["evaluations"]]
    values = np.stack([digits(each["samples"]) / NUM_SAMPLES for each in run["evaluations"]])
    place = np.interp(num_tokens, tokens, np.arange(len(tokens)))
    below = min(int(place), len(tokens) - 2)
    return values[below] + (place - below) * (values[below + 1] - values[below])


def digits(text: str) -> np.ndarray:
    return np.array([int(digit) for digit in text], dtype=float)
