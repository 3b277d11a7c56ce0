"""A run directory, read and checked: what the report is made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opsd.errors import DataError
from opsd.monitor.jsonl import read_jsonl

PER_TOKEN = ("entropy", "reverse_kl", "quadrant", "weight")
SUMMARY_OF_LINES = {
    "accuracy": "eval/accuracy",
    "reverse_kl": "eval/reverse_kl",
    "top1_agreement": "eval/top1_agreement",
}


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The files of one run. A line is a dict; a metric that was not measured is None or absent."""

    name: str  # of the run directory
    train: list[dict[str, Any]]  # one a training step, ascending
    evals: list[dict[str, Any]]  # one an evaluation, ascending; step 0 is before training
    rollouts: list[dict[str, Any]]  # for the token view, ascending by step
    summary: dict[str, Any]
    finished: bool  # False: no summary.json yet; what `summary` holds was worked out from the lines and config.yaml


def read_run(run_dir: Path) -> RunData:
    """Raises DataError, which names the file and line, where metrics.jsonl is missing or a file is malformed."""
    lines = sorted(read_jsonl(run_dir / "metrics.jsonl"), key=lambda line: line["step"])
    evals = [line for line in lines if any(name.startswith("eval/") for name in line)]
    train = [line for line in lines if "loss" in line]
    summary_path = run_dir / "summary.json"
    finished = summary_path.exists()
    return RunData(
        name=run_dir.resolve().name,
        train=train,
        evals=evals,
        rollouts=_read_rollouts(run_dir / "tokens.jsonl"),
        summary=_read_summary(summary_path) if finished else {**_summarise(train, evals), **_read_config(run_dir)},
        finished=finished,
    )


def series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, only where it was measured."""
    measured = [(line["step"], float(line[name])) for line in lines if line.get(name) is not None]
    return [step for step, _ in measured], [value for _, value in measured]


def weighted_mean(lines: list[dict[str, Any]], name: str, weight: str) -> float | None:
    """Mean of `name` over the lines, each counted `weight` times; None where nothing was measured."""
    pairs = [
        (line[name], line[weight]) for line in lines if line.get(name) is not None and line.get(weight) is not None
    ]
    total = sum(number for _, number in pairs)
    return sum(value * number for value, number in pairs) / total if total > 0 else None


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: expected JSON ({error})") from error
    if not isinstance(summary, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(summary).__name__}")
    return summary


def _read_config(run_dir: Path) -> dict[str, Any]:
    """The settings of a run without a summary, as the summary would hold them."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path}: expected YAML ({' '.join(str(error).split())})") from error
    return {"config": config, "seed": config.get("seed")}


def _summarise(train: list[dict[str, Any]], evals: list[dict[str, Any]]) -> dict[str, Any]:
    """The headline numbers of a run that is still going on, or that was killed."""
    summary: dict[str, Any] = {"steps": len(train), "kept_ratio": weighted_mean(train, "kept_ratio", "num_tokens")}
    for name, metric in SUMMARY_OF_LINES.items():
        _, values = series(evals, metric)
        summary[f"{name}_before"] = values[0] if values and evals[0]["step"] == 0 else None
        summary[f"{name}_after"] = values[-1] if len(values) > 1 else None
    phases = {key.removeprefix("phase_s/") for line in train for key in line if key.startswith("phase_s/")}
    summary["phase_s"] = {name: sum(series(train, f"phase_s/{name}")[1]) for name in phases}
    return summary


def _read_rollouts(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rollouts = read_jsonl(path)
    for number, rollout in enumerate(rollouts, start=1):
        lengths = {name: len(rollout.get(name) or ()) for name in ("tokens", *PER_TOKEN)}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{path}, line {number}: expected lists of one length, got {lengths}")
    return sorted(rollouts, key=lambda rollout: rollout["step"])
