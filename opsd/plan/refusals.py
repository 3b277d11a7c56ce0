"""What a run would be refused for, or fail of: each a sentence that names the field and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from opsd.config import EngineConfig
from opsd.errors import ConfigError
from opsd.plan.memory import GIB
from opsd.plan.models import ModelSizes
from opsd.plan.roles import Job, Role, plan_roles
from opsd.preflight import check_counts, prompt_limit

MOST_RANKS = 512  # where the search for a number of learners that fits ends


def refusals(job: Job) -> list[str]:
    """Empty where the run can start and fits. The first ones are the run's own preflight's."""
    vocab_size = min(job.student.vocab_size, job.teacher.vocab_size)
    found = [
        *_refused(lambda: check_counts(job.cfg, vocab_size, job.device)),
        *_refused(lambda: prompt_limit(job.cfg, job.student, job.teacher)),
    ]
    if job.device == "cpu":
        return [*found, *_host_memory(job)]
    return [
        *found,
        *_heads("rollout", job.cfg.rollout, job.student),
        *_heads("teacher", job.cfg.teacher, job.teacher),
        *_gpu_count(job),
        *_learner_memory(job),
        *_engine_memory(job, "rollout", job.cfg.rollout, job.student),
        *_engine_memory(job, "teacher", job.cfg.teacher, job.teacher),
    ]


def _refused(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except ConfigError as error:
        return [str(error)]
    return []


def _heads(role: str, engine: EngineConfig, model: ModelSizes) -> list[str]:
    sizes = _tensor_parallel_sizes(model)
    if engine.tensor_parallel_size in sizes:
        return []
    return [
        f"{role}.tensor_parallel_size={engine.tensor_parallel_size} does not divide the {model.num_attention_heads} "
        f"attention heads ({model.num_key_value_heads} of keys) of {model.path}: use one of "
        f"{', '.join(map(str, sizes))}"
    ]


def _tensor_parallel_sizes(model: ModelSizes) -> list[int]:
    """vLLM gives each GPU whole heads; heads of keys are repeated where they are fewer than GPUs."""
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    return [n for n in range(1, heads + 1) if heads % n == 0 and (key_heads % n == 0 or n % key_heads == 0)]


def _gpu_count(job: Job) -> list[str]:
    found = [
        f"{name}.tensor_parallel_size={engine.tensor_parallel_size} is more than a node's {job.cluster.gpus_per_node} "
        "GPUs (cluster.gpus_per_node): an engine stays on one node"
        for name, engine in (("rollout", job.cfg.rollout), ("teacher", job.cfg.teacher))
        if engine.tensor_parallel_size > job.cluster.gpus_per_node
    ]
    roles = [role for role in plan_roles(job).values() if role.num_gpus]
    wanted = sum(role.num_gpus for role in roles)
    if wanted > job.cluster.num_gpus:
        found.append(
            f"{wanted} GPUs are needed ({' + '.join(f'{role.name} {role.num_gpus}' for role in roles)}), the cluster "
            f"has {job.cluster.num_gpus} (cluster.nodes x cluster.gpus_per_node): lower learner.num_workers, "
            "rollout.num_workers or teacher.num_workers, or take more nodes"
        )
    return found


def _host_memory(job: Job) -> list[str]:
    roles = plan_roles(job).values()
    needed = sum(role.processes * role.memory.total for role in roles) / GIB
    if needed <= job.cluster.host_gib:
        return []
    largest = max(roles, key=lambda role: role.processes * role.memory.total)
    return [
        f"the processes need {needed:.1f} GiB together, the host has {job.cluster.host_gib:.1f} (cluster.host_gib); "
        f"the largest part is {largest.actors} with {largest.memory.total / GIB:.1f} GiB each: use a smaller model or "
        "a smaller learner.micro_batch_tokens there, or a machine with more memory"
    ]


def _learner_memory(job: Job) -> list[str]:
    learner = plan_roles(job)["learner"]
    if learner.memory.total <= job.gpu_bytes:
        return []
    ways = []
    ranks = _first_that_fits(job, "learner", "num_workers", range(job.cfg.learner.num_workers + 1, MOST_RANKS + 1))
    if ranks is not None:
        ways.append(f"learner.num_workers={ranks}")
    if not job.cfg.learner.activation_checkpointing:
        ways.append("learner.activation_checkpointing=true")
    ways.append("a smaller learner.micro_batch_tokens or rollout.max_response_tokens")
    return [
        f"learner.num_workers={learner.processes}: a rank needs {learner.memory.total / GIB:.1f} GiB of a GPU's "
        f"{job.cluster.gib_per_gpu:g}: take {', or '.join(ways)}"
    ]


def _engine_memory(job: Job, name: str, engine: EngineConfig, model: ModelSizes) -> list[str]:
    role = plan_roles(job)[name]
    if _fits(job, role):
        return []
    larger = [n for n in _tensor_parallel_sizes(model) if engine.tensor_parallel_size < n <= job.cluster.gpus_per_node]
    size = _first_that_fits(job, name, "tensor_parallel_size", larger)
    way = f"take {name}.tensor_parallel_size={size}" if size else "take larger GPUs or a smaller model"
    cache, weights, needed = (x / GIB for x in (role.memory.cache, role.memory.weights, _one_sequence(job, name)))
    if cache < needed:
        return [
            f"{name}.gpu_memory_utilization={engine.gpu_memory_utilization:g} of {job.cluster.gib_per_gpu:g} GiB "
            f"leaves {cache:.1f} GiB for keys and values beside {weights:.1f} GiB of weights, and one sequence of "
            f"{job.traffic.longest_sequence} tokens needs {needed:.1f}: {way}"
        ]
    return [
        f"{name}.gpu_memory_utilization={engine.gpu_memory_utilization:g}: an engine needs "
        f"{role.memory.total / GIB:.1f} GiB of a GPU's {job.cluster.gib_per_gpu:g}, for the logits that it scores come "
        f"on top of vLLM's share: lower it, or {way}"
    ]


def _fits(job: Job, role: Role) -> bool:
    """A vLLM engine also needs a cache that holds one sequence."""
    needs_cache = role.name != "learner" and getattr(job.cfg, role.name).backend == "vllm"
    holds_one = not needs_cache or role.memory.cache >= _one_sequence(job, role.name)
    return holds_one and role.memory.total <= job.gpu_bytes


def _one_sequence(job: Job, name: str) -> float:
    """Bytes of keys and values on each GPU of an engine, for the longest sequence. Heads of keys may be repeated."""
    engine, model = {"rollout": (job.cfg.rollout, job.student), "teacher": (job.cfg.teacher, job.teacher)}[name]
    share = min(engine.tensor_parallel_size, model.num_key_value_heads)
    return job.traffic.longest_sequence * model.cache_bytes_a_token(engine.dtype) / share


def _first_that_fits(job: Job, name: str, field: str, values: Iterable[int]) -> int | None:
    """The first of `values` for `name`.`field` with which that role fits."""
    for value in values:
        section = replace(getattr(job.cfg, name), **{field: value})
        changed = replace(job, cfg=replace(job.cfg, **{name: section}))
        if _fits(changed, plan_roles(changed)[name]):
            return value
    return None
