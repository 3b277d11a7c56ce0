"""What is measured of one run: held-out figures problem by problem, which tokens it kept, and what a step cost."""
# T response tokens of a step, P problems

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers

from opsd.data.grading import judge_rollouts
from opsd.ops.quadrants import quadrants
from opsd.types import Prompt
from scripts.ablation.in_process import OneProcess, Step, config, started

NUM_SAMPLES = 8  # answers to a problem, at temperature 1: mean@8, and the reverse KL over their tokens
SELECTION_FIGURES = ("q1", "q2", "q3", "q4", "entropy", "divergence", "position")


def evaluate(run: OneProcess, step: int, problems: list[Prompt]) -> dict[str, Any]:
    """The student's held-out figures after `step` steps; a digit for each problem in "greedy" and "samples".

    "greedy": whether the greedy answer is right. "samples": how many of NUM_SAMPLES are. "kl": by problem, the mean of
    log student(y) - log teacher(y) over the tokens of these, nats; "reverse_kl" over the tokens of all problems.
    """
    greedy = run.sample(problems, [0] * len(problems), version=step, greedy=True)
    asked = [prompt for prompt in problems for _ in range(NUM_SAMPLES)]
    scored = run.scored(run.sample(asked, run.held_out_seeds(problems, NUM_SAMPLES), version=step))
    grader, tokenizer = run.cfg.data.grader, run.setup.tokenizer
    right_P = [answer.right for answer in judge_rollouts(greedy, grader, tokenizer)]
    sampled = np.array([answer.right for answer in judge_rollouts(scored.rollouts, grader, tokenizer)])
    count_P = sampled.reshape(-1, NUM_SAMPLES).sum(axis=1)
    ratios = [item.rollout.sampled_logprobs - item.scores.sampled_logprobs for item in scored.items]
    sums_P, tokens_P = (
        np.array(values).reshape(-1, NUM_SAMPLES).sum(axis=1)
        for values in ([each.sum(dtype=np.float64) for each in ratios], [len(each) for each in ratios])
    )
    return {
        "step": step,
        "accuracy": float(np.mean(right_P)),
        "mean_at_8": float(count_P.mean() / NUM_SAMPLES),
        "reverse_kl": float(sums_P.sum() / tokens_P.sum()),
        "greedy": "".join(str(int(right)) for right in right_P),
        "samples": "".join(map(str, count_P)),
        "kl": [round(float(value), 4) for value in sums_P / tokens_P],
    }


_BEFORE: dict[tuple[Any, ...], dict[str, Any]] = {}


def before(run: OneProcess, problems: list[Prompt]) -> dict[str, Any]:
    """`evaluate` of the untrained student: measured once in a process for all arms of a seed."""
    cfg = run.cfg
    key = (cfg.student.path, cfg.teacher.path, cfg.data.eval_path, cfg.seed, len(problems), repr(cfg.rollout))
    if key not in _BEFORE:
        _BEFORE[key] = evaluate(run, 0, problems)
    return dict(_BEFORE[key])


def selection_figures(step: Step) -> dict[str, float]:
    """Of the kept tokens, by their weights: shares of the quadrants, mean entropy (of log V), divergence (nats), place.

    A place is 0 at the first token of an answer and 1 at its last.
    """
    tokens, selection = step.batch.tokens, step.selection
    weight_N = (selection.weight_N / selection.weight_N.sum()).double()
    length_T = torch.tensor(step.batch.lengths)[step.batch.rollout_T]
    place_T = step.batch.position_T / (length_T - 1).clamp_min(1)
    quadrant_T = quadrants(tokens.entropy_T, tokens.reverse_kl_T)
    values = [*((quadrant_T == number) for number in (1, 2, 3, 4)), tokens.entropy_T, tokens.reverse_kl_T, place_T]
    means = [float((weight_N * value_T[selection.index_N].double()).sum()) for value_T in values]
    return dict(zip(SELECTION_FIGURES, means, strict=True))


@dataclass
class Totals:
    """What a run's steps add up to."""

    trained_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    selection: list[dict[str, float]] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    learner_s: list[float] = field(default_factory=list)
    learner_peak_mib: list[float] = field(default_factory=list)

    def add(self, step: Step) -> None:
        self.trained_tokens += step.report.num_kept
        self.losses.append(round(step.report.loss, 6))
        self.selection.append(selection_figures(step))
        self.learner_s.append(step.learner_s)
        if step.learner_peak_mib is not None:
            self.learner_peak_mib.append(step.learner_peak_mib)
        if step.cosine is not None:
            self.cosines.append(step.cosine)


def measured_run(settings: list[str], eval_every: int, num_problems: int) -> dict[str, Any]:
    """A whole run and its figures. The first and the last step are evaluated, and every `eval_every` between them.

    Memory and gradients are looked at in the step before each evaluation. A process of a pool makes one such run after
    another.
    """
    transformers.utils.logging.disable_progress_bar()
    cfg = config(settings)
    began = time.process_time()
    totals = Totals()
    with started(cfg) as run:
        problems = run.setup.eval_prompts[:num_problems]
        evaluations = [{**before(run, problems), "trained_tokens": 0}]
        for step in range(cfg.num_steps):
            done = step + 1
            is_due = done % eval_every == 0 or done == cfg.num_steps
            totals.add(run.step(step, measure=is_due))
            if is_due:
                evaluations.append({**evaluate(run, done, problems), "trained_tokens": totals.trained_tokens})
    for earlier in evaluations[:-1]:
        del earlier["kl"]  # by problem of the last one alone: most of a line otherwise
    return {
        "evaluations": evaluations,
        "losses": totals.losses,
        "selection": {name: float(np.mean([each[name] for each in totals.selection])) for name in SELECTION_FIGURES},
        "cosine": float(np.mean(totals.cosines)),
        "learner_s": float(np.median(totals.learner_s)),
        "learner_peak_mib": float(np.max(totals.learner_peak_mib, initial=0.0)),
        "run_s": round(time.process_time() - began, 1),  # of a core, without the start of the process
    }
