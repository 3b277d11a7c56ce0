"""Runs as Markdown tables: python scripts/summary_table.py outputs/all-0 outputs/all-1 outputs/todi-0 outputs/todi-1

One line per run. Runs whose names differ in the number at their end alone are an arm over several seeds: a second
table has its means, and their differences to the first arm's, paired by seed, with 95 % intervals of Student's t.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path


def share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


COLUMNS = {
    "run": lambda s: s["name"],
    "selector": lambda s: selector(s["config"]),
    "seed": lambda s: str(s["seed"]),
    "accuracy before": lambda s: share(s["accuracy_before"]),
    "after": lambda s: share(s["accuracy_after"]),
    "teacher": lambda s: share(s["teacher_accuracy"]),
    "reverse KL before": lambda s: share(s["reverse_kl_before"]),
    "after ": lambda s: share(s["reverse_kl_after"]),
    "top-1 before": lambda s: share(s["top1_agreement_before"]),
    "after  ": lambda s: share(s["top1_agreement_after"]),
    "kept": lambda s: share(s["kept_ratio"]),
    "steps": lambda s: str(s["steps"]),
    "wall s": lambda s: f"{s['wall_s']:.0f}",
    "other": lambda s: f"{s['phase_s']['other'] / sum(s['phase_s'].values()):.1%}",
}


def selector(config: dict) -> str:
    """The selection in a word; a run of opsd.train has none."""
    chosen = config.get("selector")
    if chosen is None or chosen["name"] == "all":
        return "all"
    return f"{chosen['score']} {chosen['ratio']:g}"


MEASURES = {
    "accuracy after": "accuracy_after",
    "reverse KL after": "reverse_kl_after",
    "top-1 after": "top1_agreement_after",
}
# 97.5 % quantiles of Student's t, by degrees of freedom; beyond them the last is a little too wide.
T_975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> str:
    """The mean and the 95 % interval around it; with one value, that."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    half = T_975[min(len(values), len(T_975)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} [{mean - half:.3f}, {mean + half:.3f}]"


def arms(summaries: Sequence[dict]) -> dict[str, dict[int, dict]]:
    """By the name without the number at its end: the runs by seed, of arms that have several."""
    found: dict[str, dict[int, dict]] = defaultdict(dict)
    for summary in summaries:
        found[re.sub(r"[-_]?\d+$", "", summary["name"])][summary["seed"]] = summary
    return {name: runs for name, runs in found.items() if len(runs) > 1}


def arm_rows(found: dict[str, dict[int, dict]]) -> list[list[str]]:
    """Per arm and measure: its mean and the difference to the first arm, on the seeds that both have."""
    first = next(iter(found.values()))
    rows = []
    for name, runs in found.items():
        for measure, key in MEASURES.items():
            own = {seed: run[key] for seed, run in runs.items() if run[key] is not None}
            if not own:
                continue
            shared = [own[seed] - run[key] for seed, run in first.items() if seed in own and run[key] is not None]
            against = "" if runs is first or not shared else interval(shared)
            rows.append([name, measure, str(len(own)), interval(list(own.values())), against])
    return rows


def print_rows(*rows: Sequence[str]) -> None:
    for cells in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print("| " + " | ".join(cell.strip() for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    summaries = []
    for run in parser.parse_args().runs:
        file = run / "summary.json"
        if not file.is_file():
            sys.exit(f"error: {file} does not exist: has the run ended?")
        summaries.append({"name": run.name, **json.loads(file.read_text())})
    print_rows([*COLUMNS], *([show(summary) for show in COLUMNS.values()] for summary in summaries))
    if found := arms(summaries):
        print()
        against = f"less {next(iter(found))}'s, by seed"
        print_rows(["arm", "measure", "seeds", "mean [95 %]", against], *arm_rows(found))


if __name__ == "__main__":
    main()
