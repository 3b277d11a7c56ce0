"""A simulation as text: what is assumed, a table of splits and staleness, and the best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from opsd.plan.roles import Job, plan_roles
from opsd.plan.simulate.config import SimulateConfig
from opsd.plan.simulate.parts import Layout, Outcome
from opsd.plan.simulate.pipeline import ROLES, simulate
from opsd.plan.simulate.scenario import Scenario, room, scenario
from opsd.plan.simulate.search import best_split

WORTH = 0.03  # of a step's time: more staleness for less is not called better


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    layout: Layout
    outcome: Outcome
    note: str  # what the split is


def simulation_text(job: Job, cfg: SimulateConfig) -> str:
    """What the plan prints below its own table. Raises ConfigError where there is nothing to simulate."""
    found = scenario(job, cfg)
    rows = [*_own_rows(job, cfg, found), *_best_rows(job, cfg, found)]
    lines = [f"{name:<10}{text}" for name, text in _facts(job, cfg, found)]
    own = next((row for row in rows if row.note.startswith("these settings")), rows[0])
    heading = "seconds per step, and the share of its time in which a role has nothing to do"
    return "\n".join([*lines, "", heading, *_table(rows), "", _advice(rows, own)])


def _own_rows(job: Job, cfg: SimulateConfig, found: Scenario) -> Iterator[Row]:
    """These settings. Where they need GPUs that are not there the plan itself says so."""
    if sum(role.num_gpus for role in plan_roles(job)) > job.cluster.num_gpus and not _colocated(job):
        return
    for staleness in range(1 if _colocated(job) else cfg.max_staleness + 1):
        layout = replace(found.layout, max_staleness=staleness)
        is_own = staleness == job.cfg.schedule.max_staleness
        note = "these settings" if is_own else "the same split"
        note = f"{note}, colocated" if _colocated(job) else note
        yield Row(layout=layout, outcome=simulate(found.work, found.rates, layout), note=note)


def _best_rows(job: Job, cfg: SimulateConfig, found: Scenario) -> Iterator[Row]:
    """The best of all splits; a CPU has no GPUs to split."""
    if job.device == "cpu":
        return
    place = room(job)
    for staleness in range(cfg.max_staleness + 1):
        layout = replace(found.layout, max_staleness=staleness, num_devices=float("inf"))
        split, outcome = best_split(found.work, found.rates, layout, place)
        note = f"best of {place.num_gpus} GPUs"
        yield Row(layout=replace(layout, split=split), outcome=outcome, note=note)


def _colocated(job: Job) -> bool:
    return job.device == "cuda" and job.cfg.placement.mode == "colocated"


def _facts(job: Job, cfg: SimulateConfig, found: Scenario) -> Iterator[tuple[str, str]]:
    work, rates, layout = found.work, found.rates, found.layout
    mean = work.response_tokens / work.num_answers
    yield (
        "simulated",
        f"{work.num_steps} steps of {work.num_answers:,} answers with {mean:,.0f} tokens on average, lengths "
        f"{found.lengths_from}",
    )
    yield (
        "",
        f"prompts of {work.prompt_tokens:,} tokens; {work.kept_ratio:.2g} of the tokens kept; work {layout.dispatch}",
    )
    yield "rates", found.rates_from
    yield (
        "",
        f"rollout engine: {1e3 * rates.decode_step_s:.3g} ms + {1e3 * rates.decode_sequence_s:.3g} ms per sequence for "
        f"a decode step, {rates.prefill_tokens_per_s:,.0f} prompt tokens/s, {layout.max_num_seqs} sequences at most",
    )
    yield (
        "",
        f"teacher's engine: {rates.score_tokens_per_s:,.0f} tokens/s + {rates.score_batch_s:.3g} s per batch; "
        f"learner's rank: {rates.learn_tokens_per_s:,.0f} tokens/s + {rates.learn_step_s:.3g} s per step, "
        f"{rates.head_share:.0%} in the head",
    )
    yield (
        "",
        f"selection {rates.select_s:.3g} s, weight sync {rates.sync_s:.3g} s per step",
    )
    yield "", "assumed: engines and ranks are as fast beside others as alone, and ranks share a step evenly"
    if job.device == "cpu":
        yield "", f"all workers share {job.cluster.cores} cores"
    elif _colocated(job):
        yield (
            "",
            "colocated roles take turns, so there is no staleness; waking up and falling asleep takes no time here",
        )
    if found.measured is not None:
        run = found.measured
        again = simulate(
            run.work(work.num_steps, np.random.default_rng(job.cfg.seed)), rates, run.layout(layout.num_devices)
        )
        yield (
            "the run",
            f"{run.name}, {run.split}: {run.seconds_per_step:.3g} s per step measured, {again.seconds_per_step:.3g} "
            "simulated",
        )


def _table(rows: list[Row]) -> list[str]:
    header = ["split", "", "staleness", "s per step", "tokens/s", *(f"{role} idle" for role in ROLES)]
    cells = [
        [
            str(row.layout.split),
            row.note,
            str(row.layout.max_staleness),
            _seconds(row.outcome.seconds_per_step),
            f"{row.outcome.tokens_per_s:,.0f}",
            *(f"{row.outcome.idle[role]:.0%}" for role in ROLES),
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [header, *cells]) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, *cells]
    ]


def _advice(rows: list[Row], own: Row) -> str:
    """The fastest, against `own`; of those that are as good as equal, that with the least staleness."""
    fastest = min(row.outcome.seconds_per_step for row in rows)
    good = [row for row in rows if row.outcome.seconds_per_step <= fastest * (1 + WORTH)]
    best = min(good, key=lambda row: row.layout.max_staleness)
    gain = own.outcome.seconds_per_step / best.outcome.seconds_per_step
    return (
        f"best      {best.layout.split}, staleness {best.layout.max_staleness}: "
        f"{_seconds(best.outcome.seconds_per_step)} s per step, {gain:.2f} x as fast as "
        f"{own.layout.split}, staleness {own.layout.max_staleness}"
    )


def _seconds(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
