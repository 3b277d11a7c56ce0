"""Is one model better than another on the same problems, or lucky? Paired bootstrap over problems.

opsd-compare before=outputs/eval/before.jsonl after=outputs/eval/after.jsonl

Takes the per-problem files of opsd.evaluate. Every run is compared with the first: the difference in mean@k (of scores
avg@k), and the interval that holds 95 % of its values when problems are drawn again with replacement. The interval says
how much hangs on these problems; it says nothing of another training seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from opsd.errors import DataError
from opsd.evaluation.results import ProblemResult, read_results
from opsd.evaluation.table import markdown_table

HEADER = ["data", "problems", "run", "mean@k", "against", "mean@k", "difference", "95 % interval"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]FILE", help="a NAME.jsonl of opsd.evaluate; first the baseline"
    )
    parser.add_argument("--resamples", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        print(compare(args.runs, args.resamples, args.seed))
    except DataError as error:
        sys.exit(f"error: {error}")


def compare(runs: list[str], num_resamples: int, seed: int) -> str:
    """The table. Raises DataError where there are fewer than two runs or they are not of the same graded problems."""
    if len(runs) < 2:
        raise DataError(f"expected two runs or more, got {len(runs)}")
    (baseline_name, baseline), *others = [(name_of(run), load(run)) for run in runs]
    rows = []
    for name, results in others:
        check_same_problems(baseline_name, baseline, name, results)
        for source, places in places_by_source(baseline).items():
            before, after = (mean_scores(run)[places] for run in (baseline, results))
            low, high = paired_interval(after - before, num_resamples, seed)
            rows.append([
                source, str(len(places)), name, f"{after.mean():.3f}", baseline_name, f"{before.mean():.3f}",
                f"{(after - before).mean():+.3f}", f"{low:+.3f} to {high:+.3f}",
            ])  # fmt: skip
    return markdown_table(HEADER, rows)


def paired_interval(differences: np.ndarray, num_resamples: int, seed: int) -> tuple[float, float]:
    """Percentile interval (2.5 %, 97.5 %) of the mean of `differences`, one a problem, drawn with replacement."""
    generator = np.random.default_rng(seed)
    size = len(differences)
    means = [differences[generator.integers(size, size=size)].mean() for _ in range(num_resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def check_same_problems(
    baseline_name: str, baseline: list[ProblemResult], name: str, results: list[ProblemResult]
) -> None:
    if len(results) != len(baseline):
        raise DataError(
            f"{name} has {len(results)} problems, {baseline_name} has {len(baseline)}: they cannot be paired"
        )
    for number, (first, second) in enumerate(zip(baseline, results, strict=True), start=1):
        if first.identity != second.identity:
            raise DataError(
                f"{name}, line {number}: another problem than {baseline_name}'s: expected (data source, row, answer) "
                f"{first.identity}, got {second.identity}"
            )


def mean_scores(results: list[ProblemResult]) -> np.ndarray:
    """float64 [problems]: the share of each problem's answers that is right, or their mean score."""
    return np.array([np.mean(result.scores) for result in results])


def places_by_source(results: list[ProblemResult]) -> dict[str, list[int]]:
    """The places of each data source's problems; of all of them too, where there are several sources."""
    places: dict[str, list[int]] = {}
    for place, result in enumerate(results):
        places.setdefault(result.data_source, []).append(place)
    return places if len(places) == 1 else {**places, "all": list(range(len(results)))}


def name_of(run: str) -> str:
    name, separator, _ = run.partition("=")
    return name if separator else Path(run).stem


def load(run: str) -> list[ProblemResult]:
    _, separator, file = run.partition("=")
    results = read_results(file if separator else run)
    if any(answer.correct is None for result in results for answer in result.answers):
        raise DataError(f"{file or run}: its answers are not graded (data.grader=none)")
    return results


if __name__ == "__main__":
    main()
