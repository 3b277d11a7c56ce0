"""The same arms with a recipe of a cluster: each a run of its own, evaluated after it, as a line of the same raw files.

`bash recipes/ablation_gpu.sh` starts it. What is in OUT/raw already is not made again, and a run that was cut short
goes on from its newest checkpoint. OUT/runs/ARM-SEED is a run's folder; its held-out figures are those of
`recipes/eval.sh`, eight answers to each problem. Untested on GPUs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from opsd.errors import DataError, reported
from opsd.evaluation.results import read_results
from scripts.ablation.arms import CLUSTER, chosen_arms
from scripts.ablation.comparison import NUM_SAMPLES
from scripts.ablation.records import ROOT, Record, append, commit, missing_runs, read
from scripts.ablation.tables import write

STUDENT = "student"  # by which name an evaluation has it


def main() -> None:
    with reported():
        run_all(parse_args())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash recipes/ablation_gpu.sh", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--recipe", choices=CLUSTER, default="qwen3_8b_to_4b", help="whose pair and settings")
    parser.add_argument("--arms", nargs="*", default=["*"], help="names or patterns such as '*@0.2'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dry-run", action="store_true", help="print the commands and start nothing")
    parser.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="of every run; last on the line")
    args = parser.parse_args()
    try:
        args.chosen = chosen_arms(args.arms)
    except ValueError as error:
        parser.error(str(error))
    args.out = args.out.absolute()
    return args


def run_all(args: argparse.Namespace) -> None:
    """Raises DataError for results of other settings in the same folder; ends the process where a command fails."""
    wanted: list[Record] = [
        {"task": args.recipe, "arm": arm.name, "seed": seed, "settings": [*arm.settings, *args.settings]}
        for seed in args.seeds
        for arm in args.chosen
    ]
    missing = missing_runs(wanted, read(args.out), args.out)
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done", file=sys.stderr)
    plans = os.environ.get("PLAN_ONLY", "0") != "0"
    for number, each in enumerate(missing, start=1):
        print(f"{each['arm']}, seed {each['seed']}: run {number} of {len(missing)}", file=sys.stderr)
        folder = args.out / "runs" / f"{each['arm']}-{each['seed']}"
        command(args, f"{args.recipe}.sh", *each["settings"], f"seed={each['seed']}", "resume=auto",
                OUTPUT_ROOT=folder.parent, RUN_ID=folder.name)  # fmt: skip
        if plans or args.dry_run:
            continue
        cfg = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        before = evaluated(args, cfg["student"]["path"], cfg, args.out / "evaluations" / "before")
        after = evaluated(args, folder, cfg, args.out / "evaluations" / folder.name)
        append(args.out, {**each, "commit": commit(), **figures(folder, before, after)})
    if not (plans or args.dry_run):
        write(args.out)
        print(args.out / "RESULTS.md")


def evaluated(args: argparse.Namespace, model: Path | str, cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Its held-out figures, as in `evaluations` of a raw line; what was evaluated already is read."""
    if not (folder / "summary.json").is_file():
        command(args, "eval.sh", "overwrite=true", f"seed={cfg['seed']}", OUTPUT_ROOT=folder.parent, RUN_ID=folder.name,
                MODEL_PATH=model, MODEL_NAME=STUDENT, EVAL_DATA=cfg["data"]["eval_path"],
                VAL_N=NUM_SAMPLES)  # fmt: skip
    results = read_results(folder / f"{STUDENT}.jsonl")
    counts = [result.num_correct for result in results]
    if any(len(result.answers) != NUM_SAMPLES for result in results):
        raise DataError(f"{folder}: expected {NUM_SAMPLES} answers to each problem, as VAL_N of recipes/eval.sh")
    return {"mean_at_8": float(np.mean(counts) / NUM_SAMPLES), "samples": "".join(map(str, counts))}


def figures(folder: Path, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What a raw line says of a finished run beside its name. Of the whole run, greedy accuracy is the run's own."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    steps = list(training_lines(folder / "metrics.jsonl"))
    own = [
        {"step": 0, "trained_tokens": 0, **held_out(summary, "before"), **before},
        {"step": summary["steps"], "trained_tokens": summary["tokens_trained"], **held_out(summary, "after"), **after},
    ]
    return {
        "evaluations": own,
        "losses": [round(line["loss"], 6) for line in steps],
        "selection": {f"q{q}": float(np.mean([share_of_kept(line, q) for line in steps])) for q in (1, 2, 3, 4)},
        "learner_s": float(np.median([line["phase_s/learn"] for line in steps])),
        "wall_s": round(summary["wall_s"], 1),
    }


def held_out(summary: dict[str, Any], when: str) -> dict[str, Any]:
    return {name: summary.get(f"{name}_{when}") for name in ("accuracy", "reverse_kl")}


def share_of_kept(line: dict[str, Any], quadrant: int) -> float:
    """Of the kept tokens of a step those in this quadrant."""
    return line[f"quadrant_{quadrant}"] * line[f"kept_quadrant_{quadrant}"] / line["kept_ratio"]


def training_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Of each step that trained: lines of evaluations have no loss."""
    for line in path.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        if "loss" in found:
            yield found


def command(args: argparse.Namespace, recipe: str, *settings: str, **variables: Any) -> None:
    """Runs a recipe, whose messages are seen, or prints it. Ends this process where it fails: it has said why."""
    line = ["bash", str(ROOT / "recipes" / recipe), *settings]
    if args.dry_run:
        print(*(f"{name}={value}" for name, value in variables.items()), *line)
    elif subprocess.run(line, env={**os.environ, **{name: str(value) for name, value in variables.items()}}).returncode:
        sys.exit(1)


if __name__ == "__main__":
    main()
