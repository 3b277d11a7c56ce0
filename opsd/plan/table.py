"""A plan as text."""

from __future__ import annotations

from dataclasses import fields

from opsd.config.engine import TeacherConfig
from opsd.config.run import StudentConfig
from opsd.data.epochs import with_epochs_as_steps
from opsd.data.rows import count_rows
from opsd.errors import DataError
from opsd.plan.memory import GIB, Memory
from opsd.plan.models import ModelSizes, tokenizer_facts
from opsd.plan.roles import Job, Role, engine_role, plan_roles
from opsd.teacher.sources import teachers_by_source

PARTS = [field.name for field in fields(Memory)]


def plan_text(job: Job) -> str:
    """The models, the table of memory, and what a step moves."""
    facts = [
        ("machines", _machines(job)),
        ("student", _model(job.student) + _adapter(job)),
        *_teachers(job),
        *_tokenizers(job),
        *_traffic(job),
        *_cache(job),
        ("steps", _steps(job)),
    ]
    unit = "GPU" if job.device == "cuda" else "process, with those that it starts,"
    lines = [f"{name:<10}{text}" for name, text in facts]
    return "\n".join([*lines, "", f"GiB a {unit} at the peak, estimated", *_table(job)])


def _machines(job: Job) -> str:
    cluster = job.cluster
    if job.device == "cpu":
        return f"one host with {cluster.host_gib:.1f} GiB, no GPU"
    return f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gib_per_gpu:g} GiB"


def _model(model: ModelSizes) -> str:
    return f"{model.path}, {_count(model.num_parameters)} parameters, {model.vocab_size} tokens"


def _adapter(job: Job) -> str:
    trained = job.student.num_adapter_parameters
    return f"; {_count(trained)} of a LoRA adapter of rank {job.cfg.student.lora.rank} train" if trained else ""


def _teachers(job: Job) -> list[tuple[str, str]]:
    local = [("teacher", _model(engine.model)) for engine in job.teachers]
    others = [teacher for teacher in teachers_by_source(job.cfg.teacher).values() if teacher.remote]
    return [*local, *(("teacher", f"{', '.join(teacher.urls)}: its memory is there") for teacher in others)]


def _tokenizers(job: Job) -> list[tuple[str, str]]:
    """A run refuses a pair of models whose ids name different tokens; a plan can only where it sees both."""
    sections: dict[str, StudentConfig | TeacherConfig] = {"student": job.cfg.student, **job.teacher_configs}
    without = [cfg.path for section, cfg in sections.items() if tokenizer_facts(section, cfg) is None]
    return [("tokens", f"not compared: no tokenizer of {', '.join(without)} here")] if without else []


def _traffic(job: Job) -> list[tuple[str, str]]:
    cfg, traffic = job.cfg, job.traffic
    scored = traffic.score_bytes // traffic.response_tokens
    return [
        (
            "a step",
            f"{cfg.data.prompts_per_step} prompts x {cfg.data.samples_per_prompt} answers; at most "
            f"{_count(traffic.response_tokens)} response tokens, {_count(traffic.trunk_tokens)} with their prompts",
        ),
        (
            "payload",
            f"teacher scores at most {_size(traffic.score_bytes)} per step ({scored} bytes per token), rollouts "
            f"{_size(traffic.rollout_bytes)}, weights {_size(traffic.weight_bytes)} into each of "
            f"{cfg.rollout.num_workers} rollout engines",
        ),
    ]


def _cache(job: Job) -> list[tuple[str, str]]:
    """How many sequences of the longest kind each engine's cache holds."""
    found = []
    for engine in job.engines:
        if engine.config.can.reserves_cache:
            role = engine_role(job, engine)
            shards = min(role.gpus_each or 1, engine.model.num_key_value_heads)
            tokens = role.memory.cache * shards / engine.model.cache_bytes_a_token(engine.config.dtype)
            longest = tokens / job.traffic.longest_sequence
            found.append(f"{role.name} {_count(tokens)} tokens, {longest:.1f} of the longest sequences")
    return [("KV cache", "; ".join(found))] if found else []


def _steps(job: Job) -> str:
    cfg = job.cfg
    try:
        num_prompts = count_rows(cfg.data.train_path)
    except DataError as error:
        wanted = f"num_epochs={cfg.num_epochs}" if cfg.num_epochs else f"num_steps={cfg.num_steps}"
        return f"{wanted}; how many an epoch has is not known: {error}"
    epoch = num_prompts / cfg.data.prompts_per_step
    return f"{with_epochs_as_steps(cfg).num_steps} in all; an epoch of {num_prompts} prompts has {epoch:.1f}"


def _table(job: Job) -> list[str]:
    header = ["role", "GPUs", *PARTS, "total", "of"]
    rows = [header, *(_row(job, role) for role in plan_roles(job))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def _row(job: Job, role: Role) -> list[str]:
    parts = [f"{getattr(role.memory, part) / GIB:.2f}" for part in PARTS]
    limit = f"{job.cluster.gib_per_gpu:g}" if role.num_gpus else "the host's"
    return [role.actors, str(role.num_gpus), *parts, f"{role.memory.total / GIB:.2f}", limit]


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"
