"""Small seeded runs whose numbers are kept: python -m tests.golden.runs rewrites them, on purpose.

Each is ten steps of `tip.train`, from its command line, on models that are made on the spot; nothing of the project but
that command, `tip.plugin.build_hooks`, a run's folder and the process that its workers are forked from is used, so
these runs outlive any move inside. What is kept of a run stands in `<name>.json`: its losses, gradient norms, kept
tokens, the checksum of its final weights and the mean size of each.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NUM_STEPS = 10
TRANSFORMERS = ("rollout.backend=transformers", "teacher.backend=transformers")

# Name -> what its command line says beyond the settings of them all. The teacher of opsd is the student itself.
CASES: dict[str, tuple[str, ...]] = {
    "plain": ("selector=all", *TRANSFORMERS),
    "tip": ("method=tip", *TRANSFORMERS),
    "adakd": ("method=adakd", *TRANSFORMERS),
    "kdrl": ("method=kdrl", "data.grader=math", "data.prompts_per_step=4", *TRANSFORMERS),
    "gkd": ("method=gkd", *TRANSFORMERS),
    "opsd": ("method=opsd", *TRANSFORMERS),
    "ranks": ("method=tip", "learner.num_workers=2", "rollout.num_workers=2", "teacher.num_workers=2", *TRANSFORMERS),
    "learner_stats": ("method=tip", "stats=learner", *TRANSFORMERS),
    "vllm": ("method=tip",),
    "ahead": ("method=tip", "schedule.max_staleness=2", "loss.payload=hidden", "rollout.num_workers=2", *TRANSFORMERS),
}


def build_hooks(cfg: Any) -> Any:
    """Those of tip, which also write the kept tokens of every step: their places in the step's batch."""
    import tip.plugin

    hooks = tip.plugin.build_hooks(cfg)
    kept: list[int] = []

    def select(batch: Any) -> Any:
        selection = hooks.select(batch)
        kept[:] = selection.index_N.tolist()
        return selection

    def after_step(report: Any) -> None:  # of a real step: `select` is also tried on a batch that is made up
        with open(Path(cfg.output_dir) / "kept.jsonl", "a") as lines:
            lines.write(json.dumps(kept) + "\n")
        hooks.after_step(report)

    return dataclasses.replace(hooks, select=select, after_step=after_step)


def command_of(name: str, models: Path, output_dir: Path) -> list[str]:
    settings = {
        "student.path": models / "student",
        "teacher.path": models / "teacher",
        "data.train_path": models / "prompts.jsonl",
        "output_dir": output_dir,
        "hooks": "tests.golden.runs:build_hooks",
        "device": "cpu",
        "num_steps": NUM_STEPS,
        "data.prompts_per_step": 8,
        "rollout.max_response_tokens": 12,
        "rollout.num_candidates": 8,
        "teacher.top_k": 8,
        "learner.learning_rate": 1e-3,
        "learner.micro_batch_tokens": 64,
        "loss.payload": "logprobs",
        "log.wandb": "off",
        "log.dashboard": "false",
    }
    if name == "opsd":
        del settings["teacher.path"]
    return [*(f"{setting}={value}" for setting, value in settings.items()), *CASES[name]]


def run_all(names: list[str], models: Path, outputs: Path) -> None:
    """In this process, one after another. Each leaves its run folder in `outputs`."""
    from hydra.core.global_hydra import GlobalHydra

    from tip.train import main

    for name in names:
        print(f"golden  {name}", file=sys.stderr, flush=True)
        sys.argv = ["tip.train", *command_of(name, models, outputs / name), f"hydra.run.dir={outputs}"]
        main()
        GlobalHydra.instance().clear()


def record_of(output_dir: Path) -> dict[str, Any]:
    """What is kept of a finished run."""
    from safetensors.torch import load_file

    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    weights = load_file(output_dir / "student" / "model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].numpy().tobytes())
    return {
        "losses": [line["loss"] for line in steps],
        "grad_norms": [line["grad_norm"] for line in steps],
        "kept": [json.loads(line) for line in (output_dir / "kept.jsonl").read_text().splitlines()],
        "mean_abs_weight": {name: weights[name].double().abs().mean().item() for name in sorted(weights)},
        "weights_sha256": digest.hexdigest(),
    }


def written(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def write(name: str, record: dict[str, Any]) -> None:
    """A line for each step and each weight, so that a change is read in a diff."""
    parts = []
    for field, value in record.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(each)}" for key, each in value.items())
            parts.append(f'"{field}": {{\n{inner}\n}}')
        elif isinstance(value, list):
            inner = ",\n".join(f"  {json.dumps(each)}" for each in value)
            parts.append(f'"{field}": [\n{inner}\n]')
        else:
            parts.append(f'"{field}": {json.dumps(value)}')
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; none: all")
    parser.add_argument("--outputs", type=Path, help="only run, and leave the run folders here: nothing is rewritten")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in CASES]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(CASES)}")
    from opsd.cluster.warm import warm_start
    from opsd.config.engine import RolloutConfig
    from opsd.engines.vllm import engine_environment
    from tests.tiny_models import make_tiny_pair

    names = args.names or list(CASES)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        outputs = args.outputs or Path(folder) / "outputs"
        models = Path(folder) / "models"
        make_tiny_pair(models)
        with warm_start(("vllm", "transformers", "learner"), engine_environment(RolloutConfig(), "cpu")):
            run_all(names, models, outputs)
        if args.outputs is None:
            for name in names:
                write(name, record_of(outputs / name))


if __name__ == "__main__":
    main()
