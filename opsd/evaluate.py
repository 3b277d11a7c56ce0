"""`python -m opsd.evaluate`: answers of one model or several to the same problems, graded, timed and compared."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from opsd.cluster.ray import ray_cluster
from opsd.cluster.warm import warm_start
from opsd.config.auto import joins_cluster, planned_device, resolve_device, with_dtypes
from opsd.config.engine import EngineSpec
from opsd.config.paths import require_ray_token, require_writable
from opsd.config.run import compose_config
from opsd.config.setting_names import refuse_misspelt
from opsd.data.grading import ready_to_judge
from opsd.engines.installed import require_vllm
from opsd.engines.pool import EnginePool
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import engine_environment
from opsd.errors import ConfigError, reported, say
from opsd.evaluation.config import EvaluateConfig
from opsd.evaluation.generate import answer_problems, grade_problems
from opsd.evaluation.models import EvaluatedModel, check
from opsd.evaluation.plan import plan
from opsd.evaluation.results import write_results
from opsd.evaluation.scores import summarise
from opsd.evaluation.table import accuracy_table, deployment_table, parts_table, tools_table
from opsd.monitor.versions import git_commit, installed_versions


def evaluate(cfg: EvaluateConfig) -> dict[str, Any]:
    """Evaluates the models one after another. Returns what summary.json holds.

    output_dir gets NAME.jsonl of every model, a problem a line, and summary.json. Raises ConfigError, DataError or
    StageError.
    """
    device = resolve_device(cfg.device)
    if not joins_cluster():  # whose nodes may have what this one lacks
        require_ray_token()
        require_vllm({"engine": cfg.engine.backend})
    cfg = with_dtypes(cfg, device)
    require_writable("output_dir", cfg.output_dir)
    models = check(cfg)
    folder = _claim(cfg)
    evaluated = {}
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(warm_start([cfg.engine.backend], engine_environment(cfg.engine, device)))
        stack.enter_context(ready_to_judge(cfg.data.grader))
        dashboard = stack.enter_context(ray_cluster(dashboard=cfg.dashboard))
        say(f"ray     {dashboard}" if dashboard else "ray     no dashboard")
        for model in models:
            for line in model.prompt_lines:
                say(f"{model.name}: {line}")
            evaluated[model.name] = evaluate_model(model, cfg, device, folder)
    summary = {
        "models": evaluated,
        "config": asdict(cfg),
        "versions": installed_versions(),
        "git_commit": git_commit(),
        "device": device,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def evaluate_model(model: EvaluatedModel, cfg: EvaluateConfig, device: str, folder: Path) -> dict[str, Any]:
    """One model, with engines of its own that end with it."""
    sampling = Sampling(
        temperature=cfg.temperature,
        top_p=cfg.top_p,
        max_tokens=cfg.max_response_tokens,
        num_candidates=1,
        top_k=cfg.top_k,
    )
    spec = EngineSpec(
        path=model.path,
        config=cfg.engine,
        vocabulary=model.vocabulary,
        device=device,
        max_model_tokens=model.max_model_tokens,
        trust_remote_code=cfg.trust_remote_code,
    )
    engines = EnginePool(f"evaluate-{model.name}", spec)
    try:
        engines.wait_ready()
        answers, speed = answer_problems(
            engines,
            model.prompts,
            sampling,
            samples_per_problem=cfg.samples_per_problem,
            latency_problems=cfg.latency_problems,
            seed=cfg.seed,
            label=model.name,
            agents=model.agents,
        )
    finally:
        engines.close()
    results, gave_up = grade_problems(answers, model.tokenizer, cfg.data.grader)
    if gave_up:
        say(f"{model.name}: the grader gave up {gave_up} of {sum(map(len, answers))} answers, which are wrong")
    write_results(folder / f"{model.name}.jsonl", results)
    return {
        "path": model.path,
        "parameters": model.num_parameters,
        "weight_bytes": model.num_bytes,
        "figures": summarise(results),
        "grader_timeouts": gave_up,
        "speed": asdict(speed),
    }


def report(summary: dict[str, Any]) -> str:
    """The tables of a summary."""
    models = summary["models"]
    figures = {name: model["figures"] for name, model in models.items()}
    tables = [accuracy_table(figures), parts_table(figures), tools_table(figures), deployment_table(models)]
    return "\n\n".join(table for table in tables if table)


def _claim(cfg: EvaluateConfig) -> Path:
    """The output folder, empty. Raises ConfigError rather than touch a run, or another evaluation unasked."""
    folder = Path(cfg.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir={folder} is a file")
    if (folder / "config.yaml").exists():
        raise ConfigError(f"output_dir={folder} holds a run: choose another folder")
    if (folder / "summary.json").exists():
        if not cfg.overwrite:
            raise ConfigError(
                f"output_dir={folder} holds another evaluation: choose another folder, or set overwrite=true to "
                "delete it"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main() -> None:
    ConfigStore.instance().store(name="schema", node=EvaluateConfig)

    @hydra.main(version_base=None, config_path="pkg://opsd.conf", config_name="evaluate")
    def run(hydra_cfg: DictConfig) -> None:
        with reported():
            cfg = compose_config(hydra_cfg, EvaluateConfig)
            if cfg.plan_only:
                print(plan(with_dtypes(cfg, planned_device(cfg.device))))
            else:
                print(report(evaluate(cfg)))

    with reported():
        refuse_misspelt(sys.argv[1:], EvaluateConfig, "opsd.conf")
    run()


if __name__ == "__main__":
    main()
