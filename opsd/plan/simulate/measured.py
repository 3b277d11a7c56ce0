"""Rates of a finished run: those with which the model takes as long in each phase as the run did."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opsd.errors import ConfigError
from opsd.plan.simulate.lengths import of_answers
from opsd.plan.simulate.parts import Layout, Rates, Split, Work
from opsd.plan.simulate.pipeline import simulate
from opsd.report.read import read_run

PHASES = ("rollout", "score", "select", "learn", "sync")
FEWEST_STEPS = 3  # without the first, in which much happens for the first time
ROUNDS = 16  # of the search, and steps of each


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A run as the model needs it."""

    name: str
    config: dict[str, Any]
    phase_s: dict[str, float]  # seconds of a step, medians over the steps but the first
    lengths: list[int]  # response tokens of the answers in tokens.jsonl
    num_answers: int  # of a step
    prompt_tokens: int  # of a prompt, on average
    kept_ratio: float
    split: Split

    @property
    def seconds_per_step(self) -> float:
        return sum(self.phase_s.values())

    def layout(self, num_devices: float) -> Layout:
        rollout, teacher = self.config["rollout"], self.config["teacher"]
        return Layout(
            split=self.split,
            max_num_seqs=rollout["max_num_seqs"],
            group_size=rollout["group_size"],
            max_batch_tokens=teacher["max_batch_tokens"],
            num_devices=num_devices,
        )

    def work(self, num_steps: int, generator: np.random.Generator) -> Work:
        """Steps of answers like the run's."""
        return Work(
            lengths=of_answers((num_steps, self.num_answers), self.lengths, generator),
            prompt_tokens=self.prompt_tokens,
            kept_ratio=self.kept_ratio,
        )


def read_measured(folder: str) -> Measured:
    """Raises ConfigError where the run is too short or holds no answers, DataError where a file is malformed."""
    run = read_run(Path(folder))
    config = run.summary.get("config")
    lines = [line for line in run.train[1:] if all(f"phase_s/{name}" in line for name in PHASES)]
    if not config or len(lines) < FEWEST_STEPS:
        raise ConfigError(
            f"simulate.run={folder}: expected a run's folder with its settings and at least {FEWEST_STEPS + 1} steps, "
            f"got {len(run.train)} steps{'' if config else ' and no settings'}"
        )
    ahead = config.get("schedule", {}).get("max_staleness", 0)
    if ahead:
        raise ConfigError(
            f"simulate.run={folder}: its schedule.max_staleness={ahead} has the phases overlap, and what each takes "
            "alone is needed: take a run with 0"
        )
    if not run.rollouts:
        raise ConfigError(
            f"simulate.run={folder}: tokens.jsonl has no answers, whose lengths are needed: a run keeps some with "
            "log.token_view_rollouts=64 log.token_view_every=1"
        )
    num_answers = config["data"]["prompts_per_step"] * config["data"]["samples_per_prompt"]

    def median(name: str) -> float:
        return statistics.median(line[name] for line in lines)

    # The trunk ends after the last kept token, so this is a little less than the prompts have.
    prompt_tokens = (median("num_trunk_tokens") - median("num_tokens")) / num_answers
    teacher = config["teacher"]
    return Measured(
        name=run.name,
        config=config,
        phase_s={name: median(f"phase_s/{name}") for name in PHASES},
        lengths=[len(rollout["tokens"]) for rollout in run.rollouts],
        num_answers=num_answers,
        prompt_tokens=max(1, round(prompt_tokens)),
        kept_ratio=median("kept_ratio"),
        split=Split(
            rollout=config["rollout"]["num_workers"],
            teacher=len(teacher["urls"]) or teacher["num_workers"],
            learner=config["learner"]["num_workers"],
        ),
    )


def measured_rates(
    run: Measured,
    num_devices: float,
    generator: np.random.Generator,
    *,
    decode_fixed_share: float,
    overhead_share: float,
    head_share: float = 0.0,
) -> Rates:
    """The run's own split takes as long in the model as it did. What a run cannot tell apart is assumed:

    `decode_fixed_share` of a decode step is the same with any number of sequences; `overhead_share`, below 1, of a
    teacher's batch and of a learner's step is the same with any number of workers; prompts are prefilled as fast as the
    teacher scores.
    """
    work, layout = run.work(ROUNDS, generator), run.layout(num_devices)
    rates = _first_guess(run, work, layout, decode_fixed_share, overhead_share, head_share)
    for _ in range(ROUNDS):
        phase_s = simulate(work, rates, layout).phase_s
        slower = run.phase_s["rollout"] / phase_s["rollout"]
        # Carefully: a faster teacher also leaves the engines more of the cores.
        faster = (phase_s["score"] / max(run.phase_s["score"], 1e-6)) ** 0.7
        rates = replace(
            rates,
            decode_step_s=rates.decode_step_s * slower,
            decode_sequence_s=rates.decode_sequence_s * slower,
            prefill_tokens_per_s=rates.prefill_tokens_per_s * faster,
            score_tokens_per_s=rates.score_tokens_per_s * faster,
            score_batch_s=rates.score_batch_s / faster,
        )
    return rates


def _first_guess(
    run: Measured, work: Work, layout: Layout, decode_fixed_share: float, overhead_share: float, head_share: float
) -> Rates:
    """Right for selection, learning and sync, which nothing overlaps; of the others the shares are right."""
    engines, ranks, cores = run.split.rollout, run.split.learner, layout.num_devices
    step_s = run.phase_s["rollout"] / float(work.lengths.max(1).mean())  # decoding, with all sequences in it
    part = -(-work.num_answers // engines)
    batch_tokens = work.sequence_tokens / work.num_answers * min(layout.group_size, part) / run.split.teacher
    batch_s = batch_tokens * run.seconds_per_step / work.sequence_tokens
    scored_per_s = batch_tokens / (batch_s * (1 - overhead_share))
    learn_s = run.phase_s["learn"] / max(1.0, ranks / cores)
    rates = Rates(
        decode_step_s=step_s * decode_fixed_share,
        decode_sequence_s=step_s * (1 - decode_fixed_share) / min(layout.max_num_seqs, part),
        prefill_tokens_per_s=scored_per_s,
        score_tokens_per_s=scored_per_s,
        score_batch_s=batch_s * overhead_share,
        learn_tokens_per_s=1.0,
        head_share=head_share,
        select_s=run.phase_s["select"],
        sync_s=run.phase_s["sync"] / max(1.0, engines / cores),
    )
    at_one_per_s = rates.learn_s(work.sequence_tokens, work.kept_ratio, ranks)
    learn_tokens_per_s = at_one_per_s / (learn_s * (1 - overhead_share))
    return replace(rates, learn_tokens_per_s=learn_tokens_per_s, learn_step_s=learn_s * overhead_share)
