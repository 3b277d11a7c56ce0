"""What must hold before a model is loaded, each a refusal that says what to change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from opsd.config import RunConfig
from opsd.data.prompts import load_prompts
from opsd.errors import ConfigError
from opsd.model_facts import ModelFacts, facts_of
from opsd.model_folder import model_config, model_tokenizer
from opsd.placement import resolve_device
from opsd.teacher.facts import TeacherFacts, teacher_facts
from opsd.teacher.sources import check_sources, section_of, teachers_by_source
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
    support: str  # teacher | student | union: loss.support, with auto decided
    max_model_tokens: int  # the longest prompt with the longest response, and one token for the scoring engine


def check(cfg: RunConfig) -> Setup:
    """Reads configs, tokenizers and prompts; loads no weights. Raises ConfigError or DataError."""
    device = resolve_device(cfg.device)
    student_config = model_config("student.path", cfg.student.path, cfg.student.trust_remote_code)
    _check_head(cfg.student.path, student_config)
    tokenizer = model_tokenizer("student.path", cfg.student.path, cfg.student.trust_remote_code)
    student = facts_of(cfg.student.path, student_config, tokenizer)
    configs = teachers_by_source(cfg.teacher)
    teachers = {section_of(source): teacher_facts(each, section_of(source)) for source, each in configs.items()}
    vocabulary = shared_vocabulary(student, {section: facts.model for section, facts in teachers.items()})
    check_counts(cfg, vocabulary.size, device)
    support = _support(cfg.loss.support, teachers)
    max_prompt_tokens = prompt_limit(cfg, student, *(facts.model for facts in teachers.values()))
    train_prompts = load_prompts(cfg.data.train_path, cfg.data, tokenizer, max_prompt_tokens)
    eval_prompts = load_prompts(cfg.data.eval_path, cfg.data, tokenizer, max_prompt_tokens)
    check_sources([*train_prompts, *eval_prompts], configs)
    longest = max(max(len(p.token_ids), len(p.scored_after)) for p in [*train_prompts, *eval_prompts])
    return Setup(
        device=device,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        support=support,
        max_model_tokens=longest + cfg.rollout.max_response_tokens + 1,
    )


def _check_head(path: str, config: PreTrainedConfig) -> None:
    for name in LOGIT_TRANSFORMS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"student.path={path}: {name}={getattr(config, name)} in its config.json is not supported"
            )


def shared_vocabulary(student: ModelFacts, teachers: dict[str, ModelFacts]) -> Vocabulary:
    """The ids that all models know; each of them must name the same token for student and teacher."""
    models = [student, *teachers.values()]
    size = min(min(len(model.tokens), model.vocab_size) for model in models)
    for section, teacher in teachers.items():
        pairs = zip(student.tokens[:size], teacher.tokens[:size], strict=True)
        wrong = [(index, *pair) for index, pair in enumerate(pairs) if pair[0] != pair[1]]
        if wrong:
            index, student_token, teacher_token = wrong[0]
            raise ConfigError(
                f"{section}.path: its tokenizer does not share the student's ids: {len(wrong)} of {size} differ, the "
                f"first is id {index}: {student_token!r} for the student, {teacher_token!r} for the teacher"
            )
    stop_ids = {index for model in models for index in model.stop_ids if index < size}
    return Vocabulary(size=size, stop_ids=tuple(sorted(stop_ids)))


def check_counts(cfg: RunConfig, vocab_size: int, device: str) -> None:
    """Settings against each other and the shared vocabulary. Raises ConfigError."""
    for name, value in (("teacher.top_k", cfg.teacher.top_k), ("rollout.num_candidates", cfg.rollout.num_candidates)):
        if value > vocab_size:
            raise ConfigError(f"{name} must be at most the shared vocabulary's {vocab_size} tokens, got {value}")
    if cfg.loss.support in ("student", "union") and cfg.teacher.backend == "vllm":
        raise ConfigError(
            f"loss.support={cfg.loss.support} needs the teacher's scores at the student's candidates, which the vLLM "
            "backend does not give: set teacher.backend=transformers or loss.support=teacher"
        )
    if cfg.rollout.max_response_tokens > cfg.learner.micro_batch_tokens:
        raise ConfigError(
            f"learner.micro_batch_tokens ({cfg.learner.micro_batch_tokens}) must hold at least one response "
            f"(rollout.max_response_tokens={cfg.rollout.max_response_tokens})"
        )
    if cfg.rollout.weight_transfer == "nccl" and (device == "cpu" or cfg.rollout.backend != "vllm"):
        raise ConfigError(
            "rollout.weight_transfer=nccl needs GPUs and rollout.backend=vllm, this run has "
            f"{device} and {cfg.rollout.backend}: set rollout.weight_transfer=object_store"
        )
    if cfg.placement.mode == "colocated":
        _check_colocated(cfg, device)
    if device == "cpu" and max(cfg.rollout.tensor_parallel_size, cfg.teacher.tensor_parallel_size) > 1:
        raise ConfigError("tensor_parallel_size above 1 needs GPUs; this run is on the CPU")


def _support(wanted: str, teachers: dict[str, TeacherFacts]) -> str:
    """`wanted` with auto decided. Whether candidates are scored only a server knows of itself, of several each."""
    without = [section for section, facts in teachers.items() if not facts.scores_candidates]
    if wanted == "auto":
        return "teacher" if without else "union"
    if wanted != "teacher" and without:
        raise ConfigError(
            f"loss.support={wanted} needs the teacher's scores at the student's candidates, which {without[0]} does "
            "not give: take a teacher with backend=transformers, in this run or in its server, or set "
            "loss.support=teacher"
        )
    return wanted


def _check_colocated(cfg: RunConfig, device: str) -> None:
    """Refuses what cannot share a GPU."""
    mode = "placement.mode=colocated"
    if device == "cpu":
        raise ConfigError(f"{mode} shares GPUs; this run is on the CPU: set placement.mode=separate")
    roles = [cfg.rollout] if cfg.teacher.remote else [cfg.rollout, cfg.teacher]  # a server's GPUs are its own
    for role in roles:
        if role.tensor_parallel_size > 1:
            raise ConfigError(
                f"{mode}: an engine has one GPU, so {role.section}.tensor_parallel_size must be 1, "
                f"got {role.tensor_parallel_size}"
            )
        if role.backend != "vllm":
            raise ConfigError(f"{mode} needs engines that can sleep: {role.section}.backend=vllm, got {role.backend}")
    if cfg.teacher.by_source:
        raise ConfigError(f"{mode} has room for one teacher: teacher.by_source must be empty")
    if cfg.rollout.weight_transfer == "nccl":
        raise ConfigError(f"{mode}: NCCL joins no two processes on one GPU: set rollout.weight_transfer=object_store")
    both = sum(role.gpu_memory_utilization for role in roles)
    if both > 0.95:
        raise ConfigError(
            f"{mode}: rollout and teacher engines are awake together, so their gpu_memory_utilization must not sum to "
            f"more than 0.95, got {both:.2f}"
        )


def prompt_limit(cfg: RunConfig, *models: HasContext) -> int:
    """The longest prompt that leaves room for a response in every model's context. Raises ConfigError for none."""
    context = min(model.max_position_embeddings for model in models)
    room = context - cfg.rollout.max_response_tokens - 1
    if room < 1:
        raise ConfigError(
            f"rollout.max_response_tokens={cfg.rollout.max_response_tokens} leaves no room for a prompt in a "
            f"context of {context} tokens"
        )
    return min(room, cfg.data.max_prompt_tokens)
