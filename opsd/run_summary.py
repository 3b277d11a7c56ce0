"""What summary.json holds of a run: its figures, the choices that tell it from others, and what it ran with."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from opsd.config.run import RunConfig
from opsd.models.lora import AdapterSize
from opsd.monitor.versions import git_commit, installed_versions
from opsd.preflight import Setup
from opsd.run_state import Ledger


def run_summary(cfg: RunConfig, setup: Setup, ledger: Ledger) -> dict[str, Any]:
    """All of summary.json, once the last evaluation is in the ledger."""
    config = asdict(cfg)
    before, after = ledger.before, ledger.after
    return {
        **headline(config, setup.support),
        "lora": adapter_figures(cfg, setup.adapter),
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "teacher_accuracy": ledger.teacher_accuracy,
        "reverse_kl_before": before["reverse_kl"],
        "reverse_kl_after": after["reverse_kl"],
        "top1_agreement_before": before["top1_agreement"],
        "top1_agreement_after": after["top1_agreement"],
        "steps": ledger.last_step,
        **ledger.counts,
        "kept_ratio": ledger.counts["tokens_trained"] / max(1, ledger.counts["tokens_scored"]),
        "wall_s": ledger.wall_s,
        "startup_s": ledger.startup_s,
        "phase_s": ledger.phase_s,
        "versions": installed_versions(),
        "config": config,
        "seed": cfg.seed,
        "git_commit": git_commit(),
        "device": setup.device,
    }


def adapter_figures(cfg: RunConfig, adapter: AdapterSize | None) -> dict[str, Any] | None:
    """How much of the student trained; None: all of it."""
    if adapter is None:
        return None
    return {
        "rank": cfg.student.lora.rank,
        "alpha": cfg.student.lora.alpha,
        "layers": adapter.num_layers,
        "parameters_trained": adapter.num_trained,
        "parameters": adapter.num_parameters,
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
