"""What must hold before a model is loaded, each a refusal that says what to change."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from opsd.config import RunConfig
from opsd.data.prompts import load_prompts
from opsd.errors import ConfigError
from opsd.model_folder import model_config, model_tokenizer, stop_ids
from opsd.placement import resolve_device
from opsd.types import Prompt, Vocabulary

# Heads that multiply or squash the logits after lm_head; the sparse loss computes them from lm_head alone.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


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
    student_config = model_config("student.path", cfg.student.path, cfg.student.trust_remote_code)
    teacher_config = model_config("teacher.path", cfg.teacher.path, cfg.teacher.trust_remote_code)
    _check_head(cfg.student.path, student_config)
    tokenizer = model_tokenizer("student.path", cfg.student.path, cfg.student.trust_remote_code)
    teacher_tokenizer = model_tokenizer("teacher.path", cfg.teacher.path, cfg.teacher.trust_remote_code)
    size = _shared_size(tokenizer, teacher_tokenizer, student_config, teacher_config)
    ends = {
        *stop_ids(cfg.student.path, student_config, tokenizer),
        *stop_ids(cfg.teacher.path, teacher_config, teacher_tokenizer),
    }
    vocabulary = Vocabulary(size=size, stop_ids=tuple(sorted(i for i in ends if i < size)))
    _check_counts(cfg, vocabulary, device)
    max_prompt_tokens = _prompt_limit(cfg, student_config, teacher_config)
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


def _check_head(path: str, config: PreTrainedConfig) -> None:
    for name in LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"student.path={path}: {name}={getattr(config, name)} in its config.json is not supported"
            )


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


def _check_counts(cfg: RunConfig, vocabulary: Vocabulary, device: str) -> None:
    for name, value in (("teacher.top_k", cfg.teacher.top_k), ("rollout.num_candidates", cfg.rollout.num_candidates)):
        if value > vocabulary.size:
            raise ConfigError(f"{name} must be at most the shared vocabulary's {vocabulary.size} tokens, got {value}")
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


def _prompt_limit(cfg: RunConfig, student_config: PreTrainedConfig, teacher_config: PreTrainedConfig) -> int:
    """The longest prompt that leaves room for a response in both models' contexts."""
    context = min(student_config.max_position_embeddings, teacher_config.max_position_embeddings)
    room = context - cfg.rollout.max_response_tokens - 1
    if room < 1:
        raise ConfigError(
            f"rollout.max_response_tokens={cfg.rollout.max_response_tokens} leaves no room for a prompt in a "
            f"context of {context} tokens"
        )
    return min(room, cfg.data.max_prompt_tokens)
