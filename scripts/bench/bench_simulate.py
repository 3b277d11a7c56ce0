"""The plan's simulator against real runs of three splits: its rates come from the first one, the others are predicted.

    python scripts/bench/bench_simulate.py outputs/quickstart-pair outputs/simulate --steps 15

The pair is that of recipes/quickstart.sh. Each run is a process of `python -m tip.train` in a folder of its own; one
that is finished is not made again. Nothing else should run on the machine: what it takes of the cores is not in the
model. Seconds per step are the sum of the phases from rollout to sync, the median over the steps but the first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from measure import markdown
from opsd.plan.simulate.config import SimulateConfig
from opsd.plan.simulate.measured import PHASES, Measured, measured_rates, read_measured
from opsd.plan.simulate.parts import Outcome, Split
from opsd.plan.simulate.pipeline import simulate
from opsd.plan.simulate.scenario import OVERHEAD_SHARE

SPLITS = (
    Split(rollout=1, teacher=1, learner=1),
    Split(rollout=2, teacher=1, learner=1),
    Split(rollout=1, teacher=2, learner=2),
)


def make_run(pair: Path, folder: Path, split: Split, num_steps: int) -> None:
    """A run of the quick start's pair without evaluations, which keeps all answers for their lengths."""
    settings = [
        f"output_dir={folder}", "overwrite=true", f"num_steps={num_steps}", f"student.path={pair / 'student'}",
        f"teacher.path={pair / 'teacher'}", "teacher.top_k=8", f"data.train_path={pair / 'train.jsonl'}",
        f"data.eval_path={pair / 'eval.jsonl'}", "data.grader=final_hash", "data.max_prompt_tokens=72",
        "data.prompts_per_step=64", "rollout.max_response_tokens=48", "rollout.num_candidates=8",
        "learner.learning_rate=2e-3", "learner.warmup_steps=10", "learner.micro_batch_tokens=4096", "eval.every=0",
        "eval.num_problems=0", "eval.num_kl_prompts=0", "log.wandb=off", "log.dashboard=false",
        "log.token_view_every=1", "log.token_view_rollouts=64", f"rollout.num_workers={split.rollout}",
        f"teacher.num_workers={split.teacher}", f"learner.num_workers={split.learner}",
    ]  # fmt: skip
    print(f"run {split}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-P", "-m", "tip.train", *settings], check=True, stdout=sys.stderr)


def predict(first: Measured, run: Measured, num_cores: int) -> Outcome:
    """A run of `run`'s split with the rates and the answers of the first."""
    rates = measured_rates(
        first,
        num_cores,
        np.random.default_rng(0),
        decode_fixed_share=SimulateConfig.decode_fixed_share,
        overhead_share=OVERHEAD_SHARE["cpu"],
    )
    layout = replace(first.layout(num_cores), split=run.split)
    return simulate(first.work(20, np.random.default_rng(1)), rates, layout)


def table(runs: list[Measured], outcomes: list[Outcome]) -> list[list[str]]:
    """A line per run; the phases as measured / simulated."""
    rows = [["split", "measured s per step", "simulated", "simulated / measured", *PHASES]]
    for number, (run, outcome) in enumerate(zip(runs, outcomes, strict=True)):
        rows.append(
            [
                f"{run.split}{'' if number else ' (rates from it)'}",
                f"{run.seconds_per_step:.3f}",
                f"{outcome.seconds_per_step:.3f}",
                f"{outcome.seconds_per_step / run.seconds_per_step:.2f}",
                *(f"{run.phase_s[name]:.3f} / {outcome.phase_s[name]:.3f}" for name in PHASES),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=Path, help="folder with student, teacher, train.jsonl and eval.jsonl")
    parser.add_argument("output", type=Path, help="folder for the runs")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="that all workers share")
    args = parser.parse_args()
    folders = [args.output / f"{split.rollout}-{split.teacher}-{split.learner}" for split in SPLITS]
    for split, folder in zip(SPLITS, folders, strict=True):
        if not (folder / "summary.json").exists():
            make_run(args.pair, folder, split, args.steps)
    runs = [read_measured(str(folder)) for folder in folders]
    outcomes = [predict(runs[0], run, args.cores) for run in runs]
    print(f"{len(runs[0].lengths):,} answers of {np.mean(runs[0].lengths):.1f} tokens on average; {args.cores} cores\n")
    print(markdown(table(runs, outcomes)))


if __name__ == "__main__":
    main()
