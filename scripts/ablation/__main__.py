"""Arms x seeds of one task, each run in one process, appended to raw JSON lines: python -m scripts.ablation OUT

A run that is in OUT/raw already is not made again, so the same command goes on where an earlier one was stopped. For
one seed, all arms have the same initial weights, prompts, held-out problems and number of steps. Then OUT/RESULTS.md
and its figures are written anew: python -m scripts.ablation.tables OUT does that alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from opsd.errors import reported
from scripts.ablation.arms import TASKS, Task, chosen_arms
from scripts.ablation.records import ROOT, Record, append, commit, missing_runs, read

NUM_PROBLEMS = 200  # held out


def main() -> None:
    with reported():
        run_all(parse_args())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--task", choices=TASKS, default="sums")
    parser.add_argument("--arms", nargs="*", default=[], help="names or patterns such as '*@0.2'; none: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--pairs", type=Path, default=Path("outputs/ablation"), help="where the models are made")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, help="of a run, in place of the task's own number")
    args = parser.parse_args()
    try:
        args.chosen = chosen_arms(args.arms)
    except ValueError as error:
        parser.error(str(error))
    return args


def run_all(args: argparse.Namespace) -> None:
    """Raises DataError for results of other settings in the same folder."""
    task = TASKS[args.task]
    wanted = [run_of(args, task, arm.name, arm.settings, seed) for seed in args.seeds for arm in args.chosen]
    todo = missing_runs(wanted, read(args.out), args.out)
    print(f"{len(wanted)} runs, {len(wanted) - len(todo)} of them done", file=sys.stderr)
    for seed in sorted({each["seed"] for each in todo}):
        make_pair(task, pair_folder(args, seed), seed)
    from scripts.ablation.measures import measured_run  # a set that is complete loads no torch

    state = commit()
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(min(args.processes, max(1, len(todo))), mp_context=context) as pool,
        tqdm(total=len(todo), desc=args.task, unit=" runs", disable=not todo) as bar,
    ):
        jobs = {pool.submit(measured_run, each["settings"], task.eval_every, NUM_PROBLEMS): each for each in todo}
        try:
            for job in as_completed(jobs):
                append(args.out, {**jobs[job], "commit": state, **job.result()})
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    from scripts.ablation.tables import write  # matplotlib

    write(args.out)
    print(args.out / "RESULTS.md")


def run_of(args: argparse.Namespace, task: Task, arm: str, settings: tuple[str, ...], seed: int) -> Record:
    pair = pair_folder(args, seed)
    common = [
        f"student.path={pair}/student",
        f"teacher.path={pair}/teacher",
        f"data.train_path={pair}/train.jsonl",
        f"data.eval_path={pair}/eval.jsonl",
        f"num_steps={args.steps or task.num_steps}",
        f"seed={seed}",
    ]
    return {"task": args.task, "arm": arm, "seed": seed, "settings": [*settings, *task.settings, *common]}


def pair_folder(args: argparse.Namespace, seed: int) -> Path:
    return args.pairs / f"{args.task}-{seed}"


def make_pair(task: Task, folder: Path, seed: int) -> None:
    """The models and the prompts of one seed; does nothing where they are there."""
    command = [sys.executable, ROOT / "scripts" / "make_pair.py", *task.make, folder, "--seed", str(seed)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    if subprocess.run(command).returncode:
        sys.exit(1)  # it has said why


if __name__ == "__main__":
    main()
