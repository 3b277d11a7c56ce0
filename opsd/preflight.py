"""What must hold before a model is loaded, each a refusal that says what to change."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from opsd.config import RunConfig
from opsd.data.prompts import load_prompts
from opsd.errors import ConfigError
from opsd.placement import resolve_device
from opsd.types import Prompt, Vocabulary

# Heads that multiply or squash the logits after lm_head; the sparse loss computes them from lm_head alone.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class HasContext(Protocol):
    """A model's config, as far as its context goes."""

    max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the checks learnt, for those who start the run."""

    device: str  # cpu | cuda
    tokenizer: PreTrainedTokenizerBase  # the student's
    vocabulary: Vocabulary
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    max_model_tokens: int  # the longest prompt with the longest response, and one token for the scoring engine


def check(cfg: RunConfig) -> Setup:
    """Reads configs, tokenizers and prompts; loads no weights. Raises ConfigError or DataError."""
    device = resolve_device(cfg.device)
    student_config = _model_config("student", cfg.student.path, cfg.student.trust_remote_code)
    teacher_config = _model_config("teacher", cfg.teacher.path, cfg.teacher.trust_remote_code)
    _check_head(cfg.student.path, student_config)
    tokenizer = _tokenizer("student", cfg.student.path, cfg.student.trust_remote_code)
    teacher_tokenizer = _tokenizer("teacher", cfg.teacher.path, cfg.teacher.trust_remote_code)
    size = _shared_size(tokenizer, teacher_tokenizer, student_config, teacher_config)
    stop_ids = {
        *_stop_ids(cfg.student.path, student_config, tokenizer),
        *_stop_ids(cfg.teacher.path, teacher_config, teacher_tokenizer),
    }
    vocabulary = Vocabulary(size=size, stop_ids=tuple(sorted(i for i in stop_ids if i < size)))
    check_counts(cfg, vocabulary.size, device)
    max_prompt_tokens = prompt_limit(cfg, student_config, teacher_config)
    train_prompts = load_prompts(cfg.data.train_path, cfg.data, tokenizer, max_prompt_tokens)
    eval_prompts = load_prompts(cfg.data.eval_path, cfg.data, tokenizer, max_prompt_tokens)
    longest = max(max(len(p.token_ids), len(p.scored_after)) for p in [*train_prompts, *eval_prompts])
    return Setup(
        device=device,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        max_model_tokens=longest + cfg.rollout.max_response_tokens + 1,
    )


def _model_config(role: str, path: str, trust_remote_code: bool) -> PreTrainedConfig:
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(f"{role}.path={path}: there is no model here (expected a folder with a config.json)")
    return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


def _check_head(path: str, config: PreTrainedConfig) -> None:
    for name in LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"student.path={path}: {name}={getattr(config, name)} in its config.json is not supported"
            )


def _tokenizer(role: str, path: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{role}.path={path}: cannot load its tokenizer: {error}") from error


def _shared_size(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    student_config: PreTrainedConfig,
    teacher_config: PreTrainedConfig,
) -> int:
    """How many ids both models know; every one of them must name the same token in both tokenizers."""
    size = min(len(student), len(teacher), student_config.vocab_size, teacher_config.vocab_size)
    wrong = [
        (student_token, teacher_token, index)
        for index, (student_token, teacher_token) in enumerate(
            zip(student.convert_ids_to_tokens(range(size)), teacher.convert_ids_to_tokens(range(size)), strict=True)
        )
        if student_token != teacher_token
    ]
    if wrong:
        student_token, teacher_token, index = wrong[0]
        raise ConfigError(
            f"teacher.path: its tokenizer does not share the student's ids: {len(wrong)} of {size} differ, the first "
            f"is id {index}: {student_token!r} for the student, {teacher_token!r} for the teacher"
        )
    return size


def _stop_ids(path: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids with which this model ends an answer: generation_config.json, else config.json, else the tokenizer."""
    generation_file = Path(path) / "generation_config.json"
    generation = json.loads(generation_file.read_text()) if generation_file.is_file() else {}
    found: Any = generation.get("eos_token_id", config.eos_token_id)
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise ConfigError(
            f"{path}: no stop token: neither generation_config.json, config.json nor the tokenizer names one"
        )
    return list(found) if isinstance(found, (list, tuple)) else [found]


def check_counts(cfg: RunConfig, vocab_size: int, device: str) -> None:
    """Settings against each other and the shared vocabulary. Raises ConfigError."""
    for name, value in (("teacher.top_k", cfg.teacher.top_k), ("rollout.num_candidates", cfg.rollout.num_candidates)):
        if value > vocab_size:
            raise ConfigError(f"{name} must be at most the shared vocabulary's {vocab_size} tokens, got {value}")
    if cfg.loss.support != "teacher" and cfg.teacher.backend == "vllm":
        raise ConfigError(
            f"loss.support={cfg.loss.support} needs the teacher's scores at the student's candidates, which the vLLM "
            "backend does not give: set teacher.backend=transformers or loss.support=teacher"
        )
    if cfg.rollout.max_response_tokens > cfg.learner.micro_batch_tokens:
        raise ConfigError(
            f"learner.micro_batch_tokens ({cfg.learner.micro_batch_tokens}) must hold at least one response "
            f"(rollout.max_response_tokens={cfg.rollout.max_response_tokens})"
        )
    if device == "cpu" and max(cfg.rollout.tensor_parallel_size, cfg.teacher.tensor_parallel_size) > 1:
        raise ConfigError("tensor_parallel_size above 1 needs GPUs; this run is on the CPU")


def prompt_limit(cfg: RunConfig, student_config: HasContext, teacher_config: HasContext) -> int:
    """The longest prompt that leaves room for a response in both models' contexts. Raises ConfigError for none."""
    context = min(student_config.max_position_embeddings, teacher_config.max_position_embeddings)
    room = context - cfg.rollout.max_response_tokens - 1
    if room < 1:
        raise ConfigError(
            f"rollout.max_response_tokens={cfg.rollout.max_response_tokens} leaves no room for a prompt in a "
            f"context of {context} tokens"
        )
    return min(room, cfg.data.max_prompt_tokens)
