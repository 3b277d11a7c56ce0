"""The models of an evaluation: found, checked and measured before any weight is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from opsd.agents.check import TriedTools, check_template, checked_tools
from opsd.agents.toolbox import AgentSpec
from opsd.data.grading import check_grader
from opsd.data.prompts import student_prompts
from opsd.data.rows import Row, read_rows
from opsd.errors import ConfigError
from opsd.evaluation.config import EvaluateConfig
from opsd.models.folder import model_config, model_tokenizer, stop_ids, text_setting, weight_bytes
from opsd.models.tensor_parallel import check_engine_heads
from opsd.models.weights import model_without_weights
from opsd.types import Prompt, Vocabulary


@dataclass(frozen=True, kw_only=True)
class EvaluatedModel:
    """One of the models, and the problems as it sees them."""

    name: str
    path: str
    tokenizer: Any
    vocabulary: Vocabulary
    prompts: list[Prompt]
    prompt_lines: list[str]  # what was made of the files, and how their first prompts look
    max_model_tokens: int  # the longest prompt with the longest answer
    num_parameters: int  # a matrix that is tied to another counts once
    num_bytes: int  # of its weight files
    agents: AgentSpec | None  # with what tools it answers; None: with none


def check(cfg: EvaluateConfig) -> list[EvaluatedModel]:
    """All models with all problems; loads no weights. Raises ConfigError or DataError."""
    check_grader(cfg.data.grader)
    if not cfg.data.paths:
        raise ConfigError("data.paths is empty: it must name at least one file of problems")
    rows = {path: read_rows(path)[: cfg.data.num_problems or None] for path in cfg.data.paths}
    with checked_tools(cfg.tools) as tools:
        return [_check_model(name, path, rows, cfg, tools) for name, path in named_paths(cfg).items()]


def named_paths(cfg: EvaluateConfig) -> dict[str, str]:
    """Model folders by name: first those of the run, then those given one by one. Raises ConfigError."""
    found = _of_run(cfg.run) if cfg.run else {}
    for name, path in cfg.models.items():
        if name in found:
            raise ConfigError(f"models.{name}: the run {cfg.run} gives a model of this name already")
        found[name] = _student_of(path) if os.path.isfile(Path(path) / "config.yaml") else path
    return found


def _of_run(run: str) -> dict[str, str]:
    config_file = Path(run) / "config.yaml"
    if not os.path.isfile(config_file):
        raise ConfigError(f"run={run}: there is no run here (expected a folder with a config.yaml)")
    config = yaml.safe_load(config_file.read_text())
    paths = {"teacher": config["teacher"]["path"], "before": config["student"]["path"], "after": _student_of(run)}
    return {name: path for name, path in paths.items() if path}


def _student_of(run: str) -> str:
    student = Path(run) / "student"
    if not student.is_dir():
        raise ConfigError(f"{run}: this run has no student yet (it is written at the end)")
    return str(student)


def _check_model(
    name: str, path: str, rows: dict[str, list[Row]], cfg: EvaluateConfig, tools: TriedTools
) -> EvaluatedModel:
    setting = f"models.{name}"
    config = model_config(setting, path, cfg.trust_remote_code)
    tokenizer = model_tokenizer(setting, path, cfg.trust_remote_code)
    check_engine_heads("engine", cfg.engine, path, config)
    context = text_setting(path, config, "max_position_embeddings")
    room = context - cfg.max_response_tokens
    if room < 1:
        raise ConfigError(
            f"max_response_tokens={cfg.max_response_tokens} leaves no room for a prompt in {setting}'s context of "
            f"{context} tokens"
        )
    limit = min(room, cfg.data.max_prompt_tokens)
    size = min(len(tokenizer), text_setting(path, config, "vocab_size"))
    ends = tuple(sorted({index for index in stop_ids(path, config, tokenizer) if index < size}))
    agents = _agents(path, ends, cfg)
    check_template(agents, tokenizer)
    files = [student_prompts(file, own, cfg.data, tokenizer, limit, tools.schemas) for file, own in rows.items()]
    tools.try_rows([file.prompts[0] for file in files])
    prompts = [
        replace(prompt, data_source=prompt.data_source or Path(file.path).stem)
        for file in files
        for prompt in file.prompts
    ]
    skeleton = model_without_weights(path, trust_remote_code=cfg.trust_remote_code)
    return EvaluatedModel(
        name=name,
        path=path,
        tokenizer=tokenizer,
        vocabulary=Vocabulary(size=size, stop_ids=ends),
        prompts=prompts,
        prompt_lines=[line for file in files for line in file.described(tokenizer)],
        max_model_tokens=max(len(prompt.token_ids) for prompt in prompts) + cfg.max_response_tokens,
        num_parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
        num_bytes=weight_bytes(setting, path),
        agents=agents,
    )


def _agents(path: str, ends: tuple[int, ...], cfg: EvaluateConfig) -> AgentSpec | None:
    if not cfg.tools.build:
        return None
    return AgentSpec(
        tools=cfg.tools,
        path=path,
        trust_remote_code=cfg.trust_remote_code,
        stop_ids=ends,
        template_options=cfg.data.template_options,
    )
