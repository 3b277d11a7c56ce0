"""What a run would be refused for, or fail of: each a sentence that names the field and what to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from opsd.agents.check import check_teachers
from opsd.config.lora import check_lora
from opsd.config.payload import check_payload
from opsd.config.support import decide_support
from opsd.errors import ConfigError
from opsd.models.tensor_parallel import check_tensor_parallel, tensor_parallel_sizes
from opsd.plan.memory import GIB, Memory
from opsd.plan.models import ModelSizes, kept_tokenizer, tokenizer_facts
from opsd.plan.roles import Engine, Job, engine_role, learner_role, plan_roles
from opsd.plan.traffic import candidates_scored
from opsd.preflight import check_counts, prompt_limit, shared_vocabulary
from opsd.teacher.sources import section_of, teachers_by_source

MOST_RANKS = 512  # where the search for a number of learners that fits ends


def refusals(job: Job) -> list[str]:
    """Empty where the run can start and fit. The first ones are the run's own preflight's."""
    sections = {section_of(source): each for source, each in teachers_by_source(job.cfg.teacher).items()}
    models = [job.student, *(engine.model for engine in job.teachers)]
    found = [
        *_refused(lambda: check_counts(job.cfg, min(model.vocab_size for model in models), job.device)),
        *_refused(lambda: prompt_limit(job.cfg, *models)),
        *_refused(lambda: check_payload(job.cfg)),
        *_refused(lambda: check_lora(job.cfg)),
        *_refused(lambda: check_teachers(job.cfg, sections)),
        *_refused(lambda: decide_support(job.cfg.loss.support, candidates_scored(job.cfg))),
        *_tokenizers(job),
    ]
    of_heads = {engine.section: _heads(engine) for engine in job.engines}
    found += [problem for problems in of_heads.values() for problem in problems]
    if job.device == "cpu":
        return [*found, *_host_memory(job)]
    of_engines = [problem for engine in job.engines if not of_heads[engine.section] for problem in _engine(job, engine)]
    shared = shared_gpus(job) if job.cfg.placement.mode == "colocated" else []
    return [*found, *of_engines, *_gpu_count(job), *_learner(job), *shared]


def _refused(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except ConfigError as error:
        return [str(error)]
    return []


def _tokenizers(job: Job) -> list[str]:
    """As the run's own check, where the tokenizers are there; of kept models, where they are known to differ."""
    own = kept_tokenizer(job.cfg.student.path)
    for section, cfg in job.teacher_configs.items():
        other = kept_tokenizer(cfg.path)
        if own is not None and other is not None and other != own:
            return [
                f"{section}.path: its tokenizer does not share the student's ids: {cfg.path} has {other}'s, "
                f"{job.cfg.student.path} {own}'s"
            ]
    student = tokenizer_facts("student", job.cfg.student)
    found = {section: tokenizer_facts(section, cfg) for section, cfg in job.teacher_configs.items()}
    teachers = {section: facts for section, facts in found.items() if facts is not None}
    ignored = {section: cfg.ignore_tokens for section, cfg in job.teacher_configs.items()}
    return _refused(lambda: shared_vocabulary(student, teachers, ignored)) if student is not None else []


def _engine(job: Job, engine: Engine) -> list[str]:
    """What is wrong with its GPUs: a node that has too few, memory."""
    size, sizes = engine.config.tensor_parallel_size, _tensor_parallel_sizes(engine.model)
    if size > job.cluster.gpus_per_node:
        return [
            f"{engine.section}.tensor_parallel_size={size} is more than a node's {job.cluster.gpus_per_node} GPUs "
            "(cluster.gpus_per_node): an engine stays on one node"
        ]
    if engine_fits(job, engine):
        return []
    larger = (_with_tensor_parallel(engine, n) for n in sizes if size < n <= job.cluster.gpus_per_node)
    enough = next((other for other in larger if engine_fits(job, other)), None)
    way = "take larger GPUs or a smaller model"
    if enough is not None:
        way = f"take {engine.section}.tensor_parallel_size={enough.config.tensor_parallel_size}"
    return [_memory_sentence(job, engine, way)]


def _heads(engine: Engine) -> list[str]:
    size, model = engine.config.tensor_parallel_size, engine.model
    heads = (model.num_attention_heads, model.num_key_value_heads)
    return _refused(lambda: check_tensor_parallel(engine.section, size, model.path, *heads))


def _tensor_parallel_sizes(model: ModelSizes) -> list[int]:
    return tensor_parallel_sizes(model.num_attention_heads, model.num_key_value_heads)


def _with_tensor_parallel(engine: Engine, size: int) -> Engine:
    return replace(engine, config=replace(engine.config, tensor_parallel_size=size))


def engine_fits(job: Job, engine: Engine) -> bool:
    """An engine that reserves its cache also needs one that holds a sequence."""
    memory = engine_role(job, engine).memory
    holds_one = not engine.config.can.reserves_cache or memory.cache >= _one_sequence(job, engine)
    return holds_one and memory.total <= job.gpu_bytes


def _one_sequence(job: Job, engine: Engine) -> float:
    """Bytes of keys and values on each GPU of an engine, for the longest sequence. Heads of keys may be repeated."""
    share = min(engine.config.tensor_parallel_size, engine.model.num_key_value_heads)
    return job.traffic.longest_sequence * engine.model.cache_bytes_a_token(engine.config.dtype) / share


def _memory_sentence(job: Job, engine: Engine, way: str) -> str:
    memory, limit = engine_role(job, engine).memory, f"{job.cluster.gib_per_gpu:g}"
    if not engine.config.can.reserves_cache:
        return f"{engine.section} does not fit: {memory.total / GIB:.1f} GiB of a GPU's {limit}: {way}"
    cache, weights, needed = (x / GIB for x in (memory.cache, memory.weights, _one_sequence(job, engine)))
    used = engine.config.gpu_share(colocated=job.cfg.placement.mode == "colocated")
    share = f"{engine.section}.gpu_memory_utilization={used:g}"
    if cache < needed:
        return (
            f"{share} of {limit} GiB leaves {cache:.1f} GiB for keys and values beside {weights:.1f} GiB of weights, "
            f"and one sequence of {job.traffic.longest_sequence} tokens needs {needed:.1f}: {way}"
        )
    return (
        f"{share}: an engine needs {memory.total / GIB:.1f} GiB of a GPU's {limit}, for the logits that it scores come "
        f"on top of vLLM's share: lower it, or {way}"
    )


def _gpu_count(job: Job) -> list[str]:
    roles = [role for role in plan_roles(job) if role.num_gpus]
    of_each = [role.num_gpus for role in roles]
    wanted = max(of_each) if job.cfg.placement.mode == "colocated" else sum(of_each)
    if wanted <= job.cluster.num_gpus:
        return []
    return [
        f"{wanted} GPUs are needed ({', '.join(f'{role.name} {role.num_gpus}' for role in roles)}), the cluster "
        f"has {job.cluster.num_gpus} (cluster.nodes x cluster.gpus_per_node): lower learner.num_workers, "
        "rollout.num_workers or teacher.num_workers, or take more nodes"
    ]


def shared_gpus(job: Job) -> list[str]:
    """Colocated roles: the engines are awake together beside the learner's state, or asleep while the learner works."""
    learner, engines = learner_role(job).memory, [engine_role(job, engine).memory for engine in job.engines]
    awake = learner.weights + learner.optimizer + learner.runtime + sum(memory.total for memory in engines)
    asleep = learner.total + sum(memory.runtime for memory in engines)
    if max(awake, asleep) <= job.gpu_bytes:
        return []
    return [
        f"placement.mode=colocated: a GPU needs {awake / GIB:.1f} GiB while the engines work and {asleep / GIB:.1f} "
        f"while the learner does, of {job.cluster.gib_per_gpu:g}: lower rollout.gpu_memory_utilization or "
        "teacher.gpu_memory_utilization, take more GPUs or placement.mode=separate"
    ]


def _learner(job: Job) -> list[str]:
    learner = learner_role(job)
    if learner_fits(job):
        return []
    longest = job.cfg.data.max_prompt_tokens + job.cfg.rollout.max_response_tokens
    savings: dict[str, dict[str, dict[str, Any]]] = {
        "student.dtype=bfloat16": {"student": {"dtype": "bfloat16"}},
        "learner.activation_checkpointing=true": {"learner": {"activation_checkpointing": True}},
        "learner.cpu_offload=true": {"learner": {"cpu_offload": True}},
        f"learner.micro_batch_tokens={longest}": {"learner": {"micro_batch_tokens": longest}},
    }
    savings = {name: change for name, change in savings.items() if _saves(job, change)}
    ways = [
        *_enough_ranks(job),
        *(name for name, change in savings.items() if learner_fits(with_settings(job, change))),
    ]
    if not ways:
        every = job
        for change in savings.values():
            every = with_settings(every, change)
        ways = [" and ".join([*savings, *([] if learner_fits(every) else _enough_ranks(every))])]
        if not learner_fits(every) and not _enough_ranks(every):
            ways = ["a smaller student or larger GPUs"]
    return [
        f"learner.num_workers={learner.processes}: a rank needs {learner.memory.total / GIB:.1f} GiB of a GPU's "
        f"{job.cluster.gib_per_gpu:g}, {_state(learner.memory) / GIB:.1f} of it whatever the micro-batch: take "
        f"{', or '.join(ways)}"
    ]


def learner_fits(job: Job) -> bool:
    return learner_role(job).memory.total <= job.gpu_bytes


def _saves(job: Job, change: dict[str, dict]) -> bool:
    return learner_role(with_settings(job, change)).memory.total < learner_role(job).memory.total


def with_settings(job: Job, change: dict[str, dict]) -> Job:
    """`change`: settings by section."""
    sections = {name: replace(getattr(job.cfg, name), **settings) for name, settings in change.items()}
    return replace(job, cfg=replace(job.cfg, **sections))


def _enough_ranks(job: Job) -> list[str]:
    """The setting with the fewest ranks that fit; empty where no number does."""
    for ranks in range(job.cfg.learner.num_workers + 1, MOST_RANKS + 1):
        if learner_fits(with_settings(job, {"learner": {"num_workers": ranks}})):
            return [f"learner.num_workers={ranks}"]
    return []


def _state(memory: Memory) -> float:
    """Bytes that no smaller micro-batch takes away."""
    return memory.weights + memory.gradients + memory.optimizer + memory.runtime


def _host_memory(job: Job) -> list[str]:
    roles = plan_roles(job)
    needed = sum(role.processes * role.memory.total for role in roles) / GIB
    if needed <= job.cluster.host_gib:
        return []
    largest = max(roles, key=lambda role: role.processes * role.memory.total)
    ways = "a smaller model or a machine with more memory"
    if sum(role.processes * _state(role.memory) for role in roles) / GIB < job.cluster.host_gib:
        ways = f"a smaller learner.micro_batch_tokens, {ways}"
    return [
        f"the processes need {needed:.1f} GiB together, the host has {job.cluster.host_gib:.1f} (cluster.host_gib); "
        f"the largest part is {largest.actors} with {largest.memory.total / GIB:.1f} GiB each: take {ways}"
    ]
