"""What a plan's settings mean for the simulation: the work of a step, the rates, who does the work."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields, replace

import numpy as np

from opsd.errors import ConfigError
from opsd.plan.refusals import engine_fits, learner_fits, with_settings
from opsd.plan.roles import Job, engine_role
from opsd.plan.simulate.config import SimulateConfig
from opsd.plan.simulate.estimated import GPUS, estimated_rates
from opsd.plan.simulate.lengths import log_normal, of_answers
from opsd.plan.simulate.measured import Measured, measured_rates, read_measured
from opsd.plan.simulate.parts import Layout, Rates, Split, Work
from opsd.plan.simulate.search import Room

PROMPT_TOKENS = 256  # where nothing is known of them
OVERHEAD_SHARE = {"cpu": 0.5, "cuda": 0.1}  # see SimulateConfig


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """All that is simulated, and the words for where it comes from."""

    work: Work
    rates: Rates
    layout: Layout
    lengths_from: str
    rates_from: str
    measured: Measured | None  # the run that the rates are from


def scenario(job: Job, cfg: SimulateConfig) -> Scenario:
    """Raises ConfigError where a rate is missing, or where the rates are those of other engines."""
    if len(job.cfg.teacher.by_source) > 0:
        raise ConfigError("simulate: teacher.by_source has several teachers, and the simulation knows one")
    ahead = job.cfg.schedule.max_staleness
    if ahead > cfg.max_staleness:
        raise ConfigError(
            f"simulate.max_staleness={cfg.max_staleness} leaves out these settings' schedule.max_staleness={ahead}: "
            f"set simulate.max_staleness={ahead} simulate.num_steps={4 * (ahead + 1)}"
        )
    generator = np.random.default_rng(job.cfg.seed)
    measured = read_measured(cfg.run) if cfg.run else None
    if measured is not None:
        _require_same_engines(job, cfg.run, measured)
    work, lengths_from = _work(job, cfg, measured, generator)
    rates, rates_from = _rates(job, cfg, measured, work, generator)
    return Scenario(
        work=work,
        rates=rates,
        layout=_layout(job, cfg, work),
        lengths_from=lengths_from,
        rates_from=rates_from,
        measured=measured,
    )


def _work(job: Job, cfg: SimulateConfig, measured: Measured | None, generator: np.random.Generator) -> tuple[Work, str]:
    data, longest = job.cfg.data, job.cfg.rollout.max_response_tokens
    shape = cfg.num_steps, data.prompts_per_step * data.samples_per_prompt
    if measured is not None and not cfg.median_tokens:
        lengths = np.minimum(of_answers(shape, measured.lengths, generator), longest)
        words = f"as {len(measured.lengths):,} answers of {cfg.run}"
    else:
        median, tail = cfg.median_tokens or max(1, longest // 4), cfg.tail_tokens or longest
        if tail < median:
            raise ConfigError(f"simulate.median_tokens={median} is more than rollout.max_response_tokens={longest}")
        lengths = log_normal(shape, median=median, tail=tail, longest=longest, generator=generator)
        words = f"log-normal, median {median:,}, 99 % below {tail:,}, cut at {longest:,}"
        words += "" if cfg.median_tokens else " (assumed)"
    of_run = None if measured is None else measured.prompt_tokens
    prompt_tokens = cfg.prompt_tokens or of_run or min(PROMPT_TOKENS, data.max_prompt_tokens)
    kept_ratio = cfg.kept_ratio or (1.0 if measured is None else measured.kept_ratio)
    return Work(lengths=lengths, prompt_tokens=prompt_tokens, kept_ratio=kept_ratio), words


def _rates(
    job: Job, cfg: SimulateConfig, measured: Measured | None, work: Work, generator: np.random.Generator
) -> tuple[Rates, str]:
    given = cfg.given_rates
    words = f"given ({', '.join(f'simulate.{name}' for name in given)})"
    if measured is not None:
        overhead = OVERHEAD_SHARE[job.device] if cfg.overhead_share is None else cfg.overhead_share
        rates = measured_rates(
            measured,
            num_devices(job, measured.split),
            generator,
            decode_fixed_share=cfg.decode_fixed_share,
            overhead_share=overhead,
            head_share=cfg.head_share or 0.0,
        )
        source = (
            f"measured in {cfg.run}; assumed: {cfg.decode_fixed_share:.0%} of its decode step is the same with any "
            f"number of sequences, {overhead:.0%} of a teacher's batch and a learner's step with any number of workers"
        )
    elif cfg.gpu:
        if not job.teachers:
            raise ConfigError("simulate.gpu: a teacher behind HTTP has GPUs elsewhere: give its rate, simulate.run")
        context = work.prompt_tokens + float((work.lengths**2).sum() / (2 * work.lengths.sum()))
        rates = estimated_rates(job, GPUS[cfg.gpu], response_tokens=work.response_tokens, context_tokens=context)
        source = f"estimated from an {cfg.gpu.upper()}'s data sheet and assumptions, none of it measured"
    else:
        missing = [field.name for field in fields(Rates) if field.default is MISSING and field.name not in given]
        if missing:
            raise ConfigError(f"simulate.{missing[0]} is missing: give it, or simulate.run or simulate.gpu")
        return Rates(**given), words
    return replace(rates, **given), f"{source}; {words}" if given else source


def _layout(job: Job, cfg: SimulateConfig, work: Work) -> Layout:
    """These settings' own, at staleness 0."""
    rollout, teacher = job.cfg.rollout, job.cfg.teacher
    split = Split(
        rollout=rollout.num_workers,
        teacher=len(teacher.urls) or teacher.num_workers,
        learner=job.cfg.learner.num_workers,
    )
    return Layout(
        split=split,
        dispatch=cfg.dispatch,
        max_num_seqs=_most_running(job, work),
        group_size=rollout.group_size,
        max_batch_tokens=teacher.max_batch_tokens,
        num_devices=num_devices(job, split),
    )


def num_devices(job: Job, split: Split) -> float:
    """That all workers share: the cores of a CPU, the GPUs of colocated roles; else each has its own."""
    if job.device == "cpu":
        return job.cluster.cores
    colocated = job.cfg.placement.mode == "colocated"
    return max(split.rollout, split.teacher, split.learner) if colocated else math.inf


def _most_running(job: Job, work: Work) -> int:
    """Sequences in flight in a rollout engine: by its settings, and on a GPU by what its cache holds of them."""
    most, engine = job.cfg.rollout.max_num_seqs, job.engines[0]
    if job.device == "cpu" or not engine.config.can.reserves_cache:
        return most
    role = engine_role(job, engine)
    shards = min(role.gpus_each, engine.model.num_key_value_heads)
    tokens = role.memory.cache * shards / engine.model.cache_bytes_a_token(engine.config.dtype)
    return max(1, min(most, int(tokens * work.num_answers / work.sequence_tokens)))


def room(job: Job) -> Room:
    """Where roles may sit that have GPUs of their own. Raises ConfigError where there is no room for all of them."""
    cluster = job.cluster
    unfit = [engine.section for engine in job.engines if not engine_fits(job, engine)]
    ranks = next((n for n in range(1, cluster.num_gpus + 1) if learner_fits(_with_ranks(job, n))), None)
    if unfit or ranks is None:
        raise ConfigError(
            f"simulate: no split of {cluster.num_gpus} GPUs of {cluster.gib_per_gpu:g} GiB is possible: "
            f"{', '.join(unfit) or f'the learner with up to {cluster.num_gpus} ranks'} does not fit"
        )
    found = Room(
        num_gpus=cluster.num_gpus,
        rollout_gpus=job.cfg.rollout.tensor_parallel_size,
        teacher_gpus=job.teachers[0].config.tensor_parallel_size if job.teachers else 0,
        teachers=len(job.cfg.teacher.urls),
        fewest_ranks=ranks,
    )
    if found.fewest_gpus > found.num_gpus:
        raise ConfigError(
            f"simulate: no split of {found.num_gpus} GPUs is possible: a rollout engine needs {found.rollout_gpus}, a "
            f"teacher's engine {found.teacher_gpus}, the learner at least {ranks}"
        )
    return found


def _with_ranks(job: Job, ranks: int) -> Job:
    return with_settings(job, {"learner": {"num_workers": ranks}})


def _require_same_engines(job: Job, run: str, measured: Measured) -> None:
    """Rates of an engine are not those of one of another size."""
    sections = {"rollout": job.cfg.rollout, "teacher": job.cfg.teacher}
    for name, section in sections.items():
        theirs, ours = measured.config[name]["tensor_parallel_size"], section.tensor_parallel_size
        if theirs != ours:
            raise ConfigError(
                f"simulate.run={run}: its {name} engines had {name}.tensor_parallel_size={theirs}, these settings have "
                f"{ours}: the rates of the one are not the other's"
            )
