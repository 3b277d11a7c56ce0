"""The figure of a task: each arm's difference from training on all tokens, and how some arms learn."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from scripts.ablation.arms import ARMS, BASELINE
from scripts.ablation.comparison import Comparison, mean_at_8

# Okabe and Ito's colours, which the colour-blind can tell apart; markers and dashes tell them apart in grey.
GROUPS = {None: ("#000000", "o"), 0.5: ("#0072B2", "s"), 0.2: ("#E69F00", "^"), 0.1: ("#CC79A7", "D")}
CURVES = {
    "all": ("#000000", "-"),
    "random@0.2": ("#999999", "--"),
    "entropy@0.2": ("#56B4E9", "-."),
    "soft_or@0.2": ("#D55E00", "-"),
    "q3@0.2": ("#009E73", ":"),
    "dial@0.2": ("#CC79A7", "--"),
    "todi": ("#0072B2", "-."),
}


def draw(runs: Comparison, folder: Path) -> Path:
    """Writes TASK.png."""
    found = runs.against(lambda arm: BASELINE, mean_at_8)
    height = 1.6 + 0.17 * max(len(found), 12)
    figure, (forest, curves) = plt.subplots(1, 2, figsize=(10, height), gridspec_kw={"width_ratios": [3, 2]})
    ordered = sorted(found, key=lambda arm: found[arm].mean)
    for place, arm in enumerate(ordered):
        colour, marker = GROUPS[ARMS[arm].ratio]
        each = found[arm]
        forest.plot([each.low, each.high], [place, place], color=colour, linewidth=1.2)
        filled = colour if each.stands_out else "white"
        forest.plot(each.mean, place, marker, color=colour, markerfacecolor=filled, markersize=5)
    forest.axvline(0.0, color="#000000", linewidth=0.6)
    forest.set_yticks(range(len(ordered)), ordered, fontsize=7)
    forest.set_xlabel("mean@8 less that of `all`, 95 % intervals; filled: 0 left out for all arms at once")
    drawn = {ARMS[arm].ratio for arm in found}
    for ratio, (colour, marker) in ((ratio, form) for ratio, form in GROUPS.items() if ratio in drawn):
        name = "all tokens" if ratio is None else f"ratio {ratio:g}"
        forest.plot([], [], marker, color=colour, label=name)
    forest.legend(fontsize=7, loc="upper left")
    for arm, (colour, dashes) in CURVES.items():
        if arm in runs.runs:
            evaluations = [run["evaluations"] for run in runs.runs[arm]]
            steps = [each["step"] for each in evaluations[0]]
            means = np.mean([[each["mean_at_8"] for each in own] for own in evaluations], axis=0)
            curves.plot(steps, means, dashes, color=colour, label=arm)
    curves.set_xlabel("steps")
    curves.set_ylabel("mean@8, mean over seeds")
    curves.legend(fontsize=7)
    for axes in (forest, curves):
        axes.xaxis.label.set_size(8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = folder / f"{runs.task}.png"
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path
