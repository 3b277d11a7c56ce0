"""What must hold before a model is loaded, each a refusal that says what to change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np
from transformers import PreTrainedTokenizerBase

from opsd.agents.check import agent_spec, check_teachers, check_template, checked_tools
from opsd.agents.toolbox import AgentSpec
from opsd.config.auto import joins_cluster, resolve_device
from opsd.config.backends import backends_that
from opsd.config.engine import EngineConfig, EngineSpec, RolloutConfig, TeacherConfig, teacher_spec
from opsd.config.lora import check_lora
from opsd.config.paths import require_ray_token, require_writable
from opsd.config.payload import check_payload
from opsd.config.run import RunConfig
from opsd.config.support import decide_support
from opsd.data.prompts import load_prompts
from opsd.engines.installed import require_vllm
from opsd.engines.vllm_settings import llm_arguments
from opsd.errors import ConfigError, DataError
from opsd.models.facts import ModelFacts, facts_of
from opsd.models.folder import model_config, model_tokenizer
from opsd.models.lora import AdapterSize, adapter_of
from opsd.models.tensor_parallel import check_engine_heads
from opsd.models.weights import check_weights
from opsd.teacher.facts import teacher_facts
from opsd.teacher.sources import check_sources, section_of, teachers_by_source
from opsd.types import Prompt, Vocabulary


class HasContext(Protocol):
    """A model's config, as far as its context goes."""

    @property
    def max_position_embeddings(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the checks learnt, for those who start the run."""

    device: str  # cpu | cuda
    tokenizer: PreTrainedTokenizerBase  # the student's
    vocabulary: Vocabulary
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]  # none where the run is not evaluated
    prompt_lines: list[str]  # what was made of the files, and how the first prompts look
    support: str  # teacher | student | union: loss.support, with auto decided
    student: EngineSpec[RolloutConfig]  # of the rollout engines
    adapter: AdapterSize | None  # what trains of the student; None: all of it
    agents: AgentSpec | None  # with what tools it answers; None: with none
    teachers: dict[str, EngineSpec[TeacherConfig]]  # by the data_source that each scores, see opsd.teacher.sources


class _Shared(TypedDict):
    """What the engines of student and teacher have in common."""

    vocabulary: Vocabulary
    device: str
    max_model_tokens: int
    shares_gpu: bool


def check(cfg: RunConfig) -> Setup:
    """Reads configs, tokenizers and prompts; loads no weights. Raises ConfigError or DataError."""
    device = resolve_device(cfg.device)
    require_writable("output_dir", cfg.output_dir)
    configs = teachers_by_source(cfg.teacher)
    check_payload(cfg)
    check_lora(cfg)
    sections = {section_of(source): each for source, each in configs.items()}
    check_teachers(cfg, sections)
    engines = {"rollout": cfg.rollout, **sections}
    if not joins_cluster():  # whose nodes may have what this one lacks
        require_ray_token()
        require_vllm({section: engine.backend for section, engine in engines.items()})
        check_cache(engines, device)
    student_config = model_config("student.path", cfg.student.path, cfg.student.trust_remote_code)
    check_weights("student.path", cfg.student.path, cfg.student.trust_remote_code)
    tokenizer = model_tokenizer("student.path", cfg.student.path, cfg.student.trust_remote_code)
    student = facts_of(cfg.student.path, student_config, tokenizer)
    check_engine_heads("rollout", cfg.rollout, cfg.student.path, student_config)
    teachers = {section: teacher_facts(each, section) for section, each in sections.items()}
    _check_teacher_heads(sections)
    for section, teacher in sections.items():
        if not teacher.remote and teacher.path != cfg.student.path:
            check_weights(f"{section}.path", teacher.path, teacher.trust_remote_code)
    vocabulary = shared_vocabulary(
        student,
        {section: facts.model for section, facts in teachers.items()},
        {section: each.ignore_tokens for section, each in sections.items()},
    )
    check_counts(cfg, vocabulary.size, device)
    support = decide_support(cfg.loss.support, {name: facts.scores_candidates for name, facts in teachers.items()})
    max_prompt_tokens = prompt_limit(cfg, student, *(facts.model for facts in teachers.values()))
    paths = [path for path in (cfg.data.train_path, cfg.data.eval_path) if path]
    agents = agent_spec(cfg, vocabulary)
    check_template(agents, tokenizer)
    with checked_tools(cfg.tools) as tools:
        files = [load_prompts(path, cfg.data, tokenizer, max_prompt_tokens, tools.schemas) for path in paths]
        tools.try_rows([file.prompts[0] for file in files])
    train_prompts, eval_prompts = [*(file.prompts for file in files), []][:2]
    check_sources([*train_prompts, *eval_prompts], configs)
    check_prompts([*train_prompts, *eval_prompts], vocabulary)
    longest = max(max(len(p.token_ids), len(p.scored_after)) for p in [*train_prompts, *eval_prompts])
    shared: _Shared = {
        "vocabulary": vocabulary,
        "device": device,
        "max_model_tokens": longest + cfg.rollout.max_response_tokens + 1,  # one more for the scoring engine
        "shares_gpu": cfg.placement.mode == "colocated",
    }
    return Setup(
        device=device,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        prompt_lines=[line for file in files for line in file.described(tokenizer)],
        support=support,
        student=_student_spec(cfg, shared),
        adapter=adapter_of(cfg.student),
        agents=agents,
        teachers={
            source: teacher_spec(each, **shared, returns_hidden=cfg.loss.payload == "hidden")
            for source, each in configs.items()
        },
    )


def _student_spec(cfg: RunConfig, shared: _Shared) -> EngineSpec[RolloutConfig]:
    return EngineSpec(
        path=cfg.student.path,
        config=cfg.rollout,
        trust_remote_code=cfg.student.trust_remote_code,
        partial_rollouts=cfg.schedule.partial_rollouts,
        **shared,
    )


def _check_teacher_heads(sections: dict[str, TeacherConfig]) -> None:
    for section, each in sections.items():
        if each.tensor_parallel_size > 1 and not each.remote:
            config = model_config(f"{section}.path", each.path, each.trust_remote_code)
            check_engine_heads(section, each, each.path, config)


def shared_vocabulary(
    student: ModelFacts, teachers: dict[str, ModelFacts], ignored: dict[str, list[int | str]]
) -> Vocabulary:
    """The ids that all models know; each of them must name the same token for student and teacher, or be `ignored`."""
    models = [student, *teachers.values()]
    size = min(min(len(model.tokens), model.vocab_size) for model in models)
    stop_ids = {index for model in models for index in model.stop_ids if index < size}
    if not stop_ids:
        raise ConfigError(f"no model can end an answer: their stop tokens are none of the {size} ids that they share")
    foreign_ids: set[int] = set()
    for section, teacher in teachers.items():
        foreign_ids |= _ignored_ids(f"{section}.ignore_tokens", ignored[section], (student, teacher), size, stop_ids)
    for section, teacher in teachers.items():
        pairs = zip(student.tokens[:size], teacher.tokens[:size], strict=True)
        wrong = [(i, *pair) for i, pair in enumerate(pairs) if pair[0] != pair[1] and i not in foreign_ids]
        if wrong:
            index, student_token, teacher_token = wrong[0]
            some = ",".join(str(each[0]) for each in wrong[:5]) + (",..." if len(wrong) > 5 else "")
            raise ConfigError(
                f"{section}.path: its tokenizer does not share the student's ids: {len(wrong)} of {size} differ, the "
                f"first is id {index}: {student_token!r} for the student, {teacher_token!r} for the teacher; where no "
                f"text of yours needs them, leave them out by {section}.ignore_tokens=[{some}]"
            )
    return Vocabulary(size=size, stop_ids=tuple(sorted(stop_ids)), foreign_ids=tuple(sorted(foreign_ids)))


def _ignored_ids(
    field: str, tokens: list[int | str], models: tuple[ModelFacts, ModelFacts], size: int, stop_ids: set[int]
) -> set[int]:
    """The ids below `size` that `field` names. Raises ConfigError for one that is none, or ends answers."""
    found = set()
    for token in tokens:
        ids = {token} if isinstance(token, int) else {m.tokens.index(token) for m in models if token in m.tokens}
        most = max(max(len(model.tokens), model.vocab_size) for model in models)
        if not ids or not all(0 <= index < most for index in ids):
            raise ConfigError(f"{field}: {token!r} is no id below {most} and no token of the student or this teacher")
        if ids & stop_ids:
            raise ConfigError(f"{field}: {token!r} ends answers (id {min(ids & stop_ids)}), it cannot be left out")
        found |= ids
    return {index for index in found if index < size}  # what lies above is padding to one of them anyway


def check_prompts(prompts: list[Prompt], vocabulary: Vocabulary) -> None:
    """Raises DataError for a prompt with a token that the models read differently, or that one of them lacks."""
    for prompt in prompts:
        ids = np.concatenate([prompt.token_ids, prompt.scored_after])
        wrong = ids[vocabulary.is_foreign(ids)]
        if len(wrong):
            why = "teacher.ignore_tokens leaves out: student and teacher would read different prompts"
            if wrong[0] >= vocabulary.size:
                why = f"is none of the {vocabulary.size} ids that all models know"
            raise DataError(f"{prompt.source}, row {prompt.index + 1}: the prompt holds token {wrong[0]}, which {why}")


def check_counts(cfg: RunConfig, vocab_size: int, device: str) -> None:
    """Settings against each other and the shared vocabulary. Raises ConfigError."""
    for name, value in (("teacher.top_k", cfg.teacher.top_k), ("rollout.num_candidates", cfg.rollout.num_candidates)):
        if value > vocab_size:
            raise ConfigError(f"{name} must be at most the shared vocabulary's {vocab_size} tokens, got {value}")
    if cfg.rollout.max_response_tokens > cfg.learner.micro_batch_tokens:
        raise ConfigError(
            f"learner.micro_batch_tokens ({cfg.learner.micro_batch_tokens}) must hold at least one response "
            f"(rollout.max_response_tokens={cfg.rollout.max_response_tokens})"
        )
    _check_transfer(cfg, device)
    for role in _local_engines(cfg):
        if role.can.is_vllm:  # refuses what engine_args must not say
            llm_arguments(role, device, max_model_tokens=1, shares_gpu=cfg.placement.mode == "colocated")
    if cfg.placement.mode == "colocated":
        _check_colocated(cfg, device)


def check_cache(engines: Mapping[str, EngineConfig], device: str) -> None:
    """Raises ConfigError where an engine's keys and values take more memory than this machine has. By section."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    for section, engine in engines.items():
        wanted_gib = engine.num_workers * engine.kv_cache_gib
        if device == "cpu" and engine.can.reserves_cache and wanted_gib > memory_gib:
            raise ConfigError(
                f"{section}.kv_cache_gib={engine.kv_cache_gib:g} for each of {engine.num_workers} engines is more than "
                f"the {memory_gib:.1f} GiB of this machine"
            )


def _local_engines(cfg: RunConfig) -> list[EngineConfig]:
    """The sections of this run's own engines; a server's GPUs are its own."""
    return [cfg.rollout] if cfg.teacher.remote else [cfg.rollout, cfg.teacher]


def _check_transfer(cfg: RunConfig, device: str) -> None:
    """Refuses a way for the weights that GPUs or their sharing do not allow."""
    transfer = f"rollout.weight_transfer={cfg.rollout.weight_transfer}"
    way_out = "set rollout.weight_transfer=auto"
    if cfg.rollout.weight_transfer not in ("nccl", "ipc"):
        return
    if device == "cpu" or cfg.rollout.weight_transfer not in cfg.rollout.can.weight_transfers:
        able = backends_that(lambda can: cfg.rollout.weight_transfer in can.weight_transfers)
        raise ConfigError(
            f"{transfer} needs GPUs and rollout.backend={able}, this run has {device} and {cfg.rollout.backend}: "
            f"{way_out}"
        )
    if cfg.rollout.weight_transfer == "nccl" and cfg.placement.mode == "colocated":
        raise ConfigError(f"placement.mode=colocated: NCCL joins no two processes on one GPU: {way_out}")
    if cfg.rollout.weight_transfer == "ipc" and cfg.placement.mode != "colocated":
        raise ConfigError(f"{transfer} is for engines on the learner's GPUs, placement.mode=colocated: {way_out}")
    if cfg.rollout.weight_transfer == "ipc" and cfg.rollout.num_workers > cfg.learner.num_workers:
        raise ConfigError(
            f"{transfer}: an engine takes the weights from the learner on its GPU, so rollout.num_workers must be at "
            f"most learner.num_workers={cfg.learner.num_workers}, got {cfg.rollout.num_workers}: {way_out}"
        )


def _check_colocated(cfg: RunConfig, device: str) -> None:
    """Refuses what cannot share a GPU."""
    mode = "placement.mode=colocated"
    if device == "cpu":
        raise ConfigError(f"{mode} shares GPUs; this run is on the CPU: set placement.mode=separate")
    roles = _local_engines(cfg)
    for role in roles:
        if role.tensor_parallel_size > 1:
            raise ConfigError(
                f"{mode}: an engine has one GPU, so {role.section}.tensor_parallel_size must be 1, "
                f"got {role.tensor_parallel_size}"
            )
        if not role.can.sleeps:
            able = backends_that(lambda can: can.sleeps)
            raise ConfigError(f"{mode} needs engines that can sleep: {role.section}.backend={able}, got {role.backend}")
    if cfg.teacher.by_source:
        raise ConfigError(f"{mode} has room for one teacher: teacher.by_source must be empty")
    both = sum(role.gpu_share(colocated=True) for role in roles)
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
