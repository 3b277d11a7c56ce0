"""One line per run, as a Markdown table: python scripts/summary_table.py outputs/seed0 outputs/seed1 ..."""

from __future__ import annotations

import argparse
import json
import sys
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    rows = []
    for run in parser.parse_args().runs:
        file = run / "summary.json"
        if not file.is_file():
            sys.exit(f"error: {file} does not exist: has the run ended?")
        summary = {"name": run.name, **json.loads(file.read_text())}
        rows.append([show(summary) for show in COLUMNS.values()])
    for cells in ([*COLUMNS], ["---"] * len(COLUMNS), *rows):
        print("| " + " | ".join(cell.strip() for cell in cells) + " |")


if __name__ == "__main__":
    main()
