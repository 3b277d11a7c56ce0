"""Answers from running engines, and how long they take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

from tqdm import tqdm

from opsd.agents.toolbox import AgentSpec
from opsd.agents.trajectories import trajectories_of
from opsd.data.grading import NOTHING, judge_rollouts
from opsd.data.math_process import Judgement
from opsd.data.thoughts import last_turn_ids
from opsd.engines.groups import in_order
from opsd.engines.pool import EnginePool, request_seed
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.evaluation.results import Answer, ProblemResult, ToolUse, Turn
from opsd.monitor.tools import between_texts
from opsd.sequences import Trajectory
from opsd.types import Prompt, Rollout

GROUP_SIZE = 16  # answers that an engine reports together: how fine the progress is


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Wall clock on the side of the caller, so that Ray's part (milliseconds) is in it; grading is not.

    One at a time: an engine has one problem only, after one answer to warm up; the median over problems. All together:
    every answer of the evaluation, as many in flight as the engines take. The last tokens of the last answers are drawn
    with few in flight, so a short evaluation shows less than an engine can do. Tokens are the model's own; where it has
    tools, the seconds are theirs, too.
    """

    answer_s: float | None  # seconds of an answer, one at a time; None: not measured
    answer_tokens_per_s: float | None  # one at a time
    total_s: float  # all together
    tokens_per_s: float  # all together, over all engines


def answer_problems(
    engines: EnginePool,
    prompts: list[Prompt],
    sampling: Sampling,
    *,
    samples_per_problem: int,
    latency_problems: int,
    seed: int,
    label: str,
    agents: AgentSpec | None = None,
) -> tuple[list[list[Rollout]], Speed]:
    """`samples_per_problem` answers to every prompt, in the order given, and how fast they came.

    The first `latency_problems` are answered one at a time before. `label` stands beside the progress. `agents`: with
    what tools; None: with none.
    """
    generate = partial(engines.generate, sampling=sampling, policy_version=0, wrap=trajectories_of(agents))
    measured = prompts[:latency_problems]
    alone = [_timed_answer(generate, prompt, seed) for prompt in [*measured[:1], *measured]][1:]
    requests = [
        (prompt, sample, request_seed(seed, place, sample))
        for place, prompt in enumerate(prompts)
        for sample in range(samples_per_problem)
    ]
    began = time.perf_counter()
    groups = generate(requests, group_size=GROUP_SIZE)
    rollouts = in_order(_with_progress(groups, len(requests), label))
    total_s = time.perf_counter() - began
    speed = Speed(
        answer_s=median(seconds for seconds, _ in alone) if alone else None,
        answer_tokens_per_s=median(tokens / seconds for seconds, tokens in alone) if alone else None,
        total_s=total_s,
        tokens_per_s=sum(map(len, rollouts)) / total_s,
    )
    starts = range(0, len(rollouts), samples_per_problem)
    return [rollouts[start : start + samples_per_problem] for start in starts], speed


def grade_problems(answers: list[list[Rollout]], tokenizer: Any, grader: str) -> tuple[list[ProblemResult], int]:
    """The answers to each problem, by the graders of training, and how many answers the grader gave up."""
    rollouts = [rollout for of_one in answers for rollout in of_one]
    judged = judge_rollouts(rollouts, grader, tokenizer) if grader != "none" else [NOTHING] * len(rollouts)
    graded = iter(_graded(*pair, tokenizer, grader) for pair in zip(rollouts, judged, strict=True))
    results = [
        ProblemResult(
            data_source=of_one[0].prompt.data_source,
            row=of_one[0].prompt.index,
            reference=of_one[0].prompt.answer,
            prompt=of_one[0].prompt.text,
            answers=tuple(islice(graded, len(of_one))),
        )
        for of_one in answers
    ]
    return results, sum(answer.gave_up for answer in judged)


def _graded(rollout: Rollout, judged: Judgement, tokenizer: Any, grader: str) -> Answer:
    return Answer(
        text=tokenizer.decode(last_turn_ids(rollout), skip_special_tokens=True),
        extracted=judged.value,
        correct=None if grader == "none" or rollout.prompt.answer is None else judged.right,
        tokens=len(rollout),
        truncated=not rollout.stopped,
        score=judged.score,
        parts=None if judged.parts is None else dict(judged.parts),
        tool_use=None if rollout.trajectory is None else _tool_use(rollout, rollout.trajectory, tokenizer),
    )


def _tool_use(rollout: Rollout, trajectory: Trajectory, tokenizer: Any) -> ToolUse:
    between = [*between_texts(rollout, tokenizer), (len(rollout), "")]
    starts = trajectory.turn_starts
    return ToolUse(
        turns=tuple(
            Turn(wrote=tokenizer.decode(rollout.response_ids[start:end]), read=text)
            for start, (end, text) in zip(starts, between, strict=True)
        ),
        end=trajectory.end,
        num_calls=trajectory.num_calls,
        failures=dict(trajectory.failures),
        num_read=len(trajectory.read_ids),
    )


def _timed_answer(
    generate: Callable[[list[Request]], Iterable[dict[int, Rollout]]], prompt: Prompt, seed: int
) -> tuple[float, int]:
    """(seconds, tokens)"""
    began = time.perf_counter()
    [rollout] = in_order(generate([(prompt, 0, request_seed(seed, prompt.index))]))
    return time.perf_counter() - began, len(rollout)


def _with_progress(groups: Iterable[dict[int, Rollout]], total: int, name: str) -> Iterator[dict[int, Rollout]]:
    """A bar on a terminal; in a log file a line every half minute."""
    pause_s = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, desc=name, unit=" answers", mininterval=pause_s, maxinterval=pause_s) as bar:
        for group in groups:
            bar.update(len(group))
            yield group
