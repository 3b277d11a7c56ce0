"""RESULTS.md and its figures, from the raw lines alone: python -m scripts.ablation.tables FOLDER

Every number of RESULTS.md is made here, so that a test can compare the page with the raw files beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opsd.errors import reported
from opsd.evaluation.table import markdown_table
from scripts.ablation.arms import ARMS, BASELINE, CLUSTER, TASKS
from scripts.ablation.comparison import Comparison, area, comparison, final, mean_at_8, reverse_kl
from scripts.ablation.intervals import Difference
from scripts.ablation.records import Record, read

HEAD = """# Ablation

Written by `python -m scripts.ablation.tables` from the lines in `raw/`; `bash recipes/ablation.sh` makes those, and any
one of them again: `bash recipes/ablation.sh --task TASK --arms ARM --seeds SEED`.

An arm is a rule for which tokens are trained on, with what weight, or by which loss; `entropy@0.2` keeps a fifth of
them. For one seed, all arms have the same initial student, teacher, prompts, held-out problems and number of steps.
*mean@8* is the share of right answers among eight at temperature 1 to each problem, *area* its mean over the steps of
training, *reverse KL* the mean of log student − log teacher over the tokens of these answers, in nats. Differences are
paired problem by problem. Intervals (95 %) are percentiles over resamples of the seeds and of each seed's problems;
**bold** is a difference whose interval for all arms of its column at once leaves 0 out. A seed is one pair of models,
so with few seeds the intervals are rather too narrow, and with one they say nothing of other pairs. The models are tiny
and the learning rate is one for all arms: the tables say what holds here.
"""

KEPT_NOTE = """Of the tokens that an arm trains on, by their weights: shares of the four quadrants (Q1 high entropy and
divergence, Q2 high and low, Q3 low and high, Q4 low), mean entropy as a share of log V, divergence in nats,
place in the answer from 0 to 1. *cosine*: of the arm's gradient with that of the reverse KL on every token, before the
optimiser. *learner*: median seconds of a core for an optimiser step, and by how much it raised the process's resident
memory at most. Empty: not measured.

"""

KEPT = {**dict.fromkeys(("q1", "q2", "q3", "q4"), ".2f"), "entropy": ".3f", "divergence": ".3f", "position": ".2f"}
DOES_NOT_SAY = """What it does not say: whether a rule would win at a learning rate of its own, with more steps, with
larger models or another vocabulary, or on a task where most tokens are easy.
"""
WHAT = {**{name: task.what for name, task in TASKS.items()}, **CLUSTER}  # by name, in a few words


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with reported():
        write(Path(sys.argv[1]))


def write(folder: Path) -> None:
    """RESULTS.md, and a figure for each task beside it. Raises DataError for raw lines that cannot be compared."""
    from scripts.ablation.figures import draw

    records = read(folder)
    (folder / "RESULTS.md").write_text(page(records), encoding="utf-8")
    for task in tasks_of(records):
        draw(comparison(task, records), folder)


def page(records: list[Record]) -> str:
    """The whole of RESULTS.md."""
    sections = [section(comparison(task, records)) for task in tasks_of(records)]
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


def tasks_of(records: list[Record]) -> list[str]:
    return [task for task in WHAT if any(each["task"] == task for each in records)]


def section(runs: Comparison) -> str:
    """What was run of a task, and its tables."""
    base = runs.runs[BASELINE]
    every = [run for arm in runs.runs.values() for run in arm]
    first = base[0]["evaluations"][0]
    before = cell(runs, BASELINE, lambda run: run["evaluations"][0]["accuracy"])
    lines = [
        f"## {runs.task}",
        "",
        f"{WHAT[runs.task]}. Arms: {len(runs.runs)}; seeds: {len(runs.seeds)}; steps: {final(base[0])['step']}; "
        f"{len(first['samples'])} held-out problems per seed. Greedy accuracy of the student before: {before}. "
        f"Commits: {', '.join(sorted({run['commit'][:12] for run in every}))}. "
        f"Cost: {cost(every)}.",
    ]
    lines += ["", "### What it says", "", *reading(runs), "", DOES_NOT_SAY.rstrip()]
    if runs.incomplete:
        lines += ["", f"Arms that lack some seeds, and stand in no table: {', '.join(runs.incomplete)}."]
    for title, table in (
        ("After equal steps", equal_steps(runs)),
        ("After equal trained tokens", equal_tokens(runs)),
        ("Which tokens, and at what cost", kept_tokens(runs)),
    ):
        if table:
            lines += ["", f"### {title}", "", table.rstrip()]
    return "\n".join([*lines, "", f"![Differences of mean@8]({runs.task}.png)", ""])


def reading(runs: Comparison) -> list[str]:
    """For each comparison: which arms are better, which worse, and which cannot be told apart."""
    by_ratio: dict[str, dict[str, Difference]] = {}
    for arm, each in runs.against(lambda arm: ARMS[arm].random, mean_at_8).items():
        by_ratio.setdefault(f"{ARMS[arm].ratio:g}", {})[arm] = each
    equal_tokens = {arm: each for arm, (_, each) in runs.at_equal_tokens().items()}
    found = {
        "Than `all`, after equal steps": runs.against(lambda arm: BASELINE, mean_at_8),
        **{f"Than as many random tokens, a share of {ratio}": arms for ratio, arms in by_ratio.items()},
        "Than `all`, after equal trained tokens": equal_tokens,
    }
    return [line for than, arms in found.items() if arms for line in (f"- {than}:", *verdict(arms))]


def verdict(found: dict[str, Difference]) -> list[str]:
    """By mean@8 and the interval for all arms of the comparison at once; the largest difference first."""
    ordered = sorted(found, key=lambda arm: -abs(found[arm].mean))
    better = [f"`{arm}` {shown(found[arm])}" for arm in ordered if found[arm].stands_out and found[arm].mean > 0]
    worse = [f"`{arm}` {shown(found[arm])}" for arm in ordered if found[arm].stands_out and found[arm].mean < 0]
    neither = [f"`{arm}` {shown(found[arm])}" for arm in ordered if not found[arm].stands_out]
    groups = {"better": better, "worse": worse, "not told apart": neither}
    return [f"  - {name}: {', '.join(arms) or 'none'}" for name, arms in groups.items()]


def cost(runs: list[Record]) -> str:
    """Of a core, or of all machines of a run where it had some."""
    name, of_what = ("run_s", "of a core") if "run_s" in runs[0] else ("wall_s", "of the machines of a run")
    total = sum(run[name] for run in runs)
    return f"{total / 3600:.2f} hours {of_what}, {total / len(runs):.0f} s of it per run"


def cell(runs: Comparison, arm: str, value: Callable[[Record], Any], form: str = ".3f") -> str:
    """The mean over the arm's runs; empty where it was not measured."""
    values = [value(run) for run in runs.runs[arm]]
    return "" if None in values else f"{sum(values) / len(values):{form}}"


def equal_steps(runs: Comparison) -> str:
    def to_all(arm: str) -> str | None:
        return BASELINE

    def to_random(arm: str) -> str | None:
        return ARMS[arm].random

    versus_all, versus_random = runs.against(to_all, mean_at_8), runs.against(to_random, mean_at_8)
    by_area = runs.against(to_all, area)
    by_kl = runs.against(to_all, reverse_kl) if "kl" in final(runs.runs[BASELINE][0]) else {}
    header = [
        "arm", "greedy", "mean@8", "less `all`", "less `random` at its ratio", "area", "area less `all`", "reverse KL",
        "reverse KL less `all`, mean of problems",
    ]  # fmt: skip
    rows = [
        [
            f"`{arm}`",
            cell(runs, arm, lambda run: final(run)["accuracy"]),
            f"{runs.mean(arm, lambda run: mean_at_8(run).mean()):.3f}",
            shown(versus_all.get(arm)),
            shown(versus_random.get(arm)),
            f"{runs.mean(arm, lambda run: area(run).mean()):.3f}",
            shown(by_area.get(arm)),
            cell(runs, arm, lambda run: final(run)["reverse_kl"]),
            shown(by_kl.get(arm)),
        ]
        for arm in runs.runs
    ]
    return markdown_table(header, rows)


def equal_tokens(runs: Comparison) -> str:
    found = runs.at_equal_tokens()
    header = ["arm", "trained tokens, of `all`'s", "mean@8", "`all` after as many tokens", "difference"]
    rows = [
        [
            f"`{arm}`",
            f"{runs.trained_share(arm):.3f}",
            f"{runs.mean(arm, lambda run: mean_at_8(run).mean()):.3f}",
            f"{base:.3f}",
            shown(each),
        ]
        for arm, (base, each) in found.items()
    ]
    return markdown_table(header, rows) if rows else ""


def kept_tokens(runs: Comparison) -> str:
    """By weight, over all steps: see `selection_figures`."""
    header = ["arm", "Q1", "Q2", "Q3", "Q4", "entropy", "divergence", "place", "cosine", "learner s", "learner MiB"]
    rows = [
        [
            f"`{arm}`",
            *(cell(runs, arm, lambda run, name=name: run["selection"].get(name), form) for name, form in KEPT.items()),
            cell(runs, arm, lambda run: run.get("cosine"), ".2f"),
            cell(runs, arm, lambda run: run["learner_s"]),
            cell(runs, arm, lambda run: run.get("learner_peak_mib"), ".0f"),
        ]
        for arm in runs.runs
    ]
    return KEPT_NOTE + markdown_table(header, rows)


def shown(difference: Difference | None) -> str:
    """+0.012 (+0.001 to +0.023); empty where there is none."""
    if difference is None:
        return ""
    mean = f"{difference.mean:+.3f}"
    mean = f"**{mean}**" if difference.stands_out else mean
    return f"{mean} ({difference.low:+.3f} to {difference.high:+.3f})"


if __name__ == "__main__":
    main()
