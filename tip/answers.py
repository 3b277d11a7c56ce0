"""Whose answers per step trains on.

    ANSWERS[name](rollout_pool, teacher_pool, *, seed, max_tokens, **options) -> RolloutSource

Answers that the student did not sample have policy_version -1 and carry no log-probabilities of the student: they need
stats=learner. The student's are asked for at once and not where the groups are taken, so that with
schedule.max_staleness the weights that make them are not left to chance.
"""
# T response tokens

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from opsd.engines.groups import in_order
from opsd.engines.pool import occurrences, sample_seed
from opsd.errors import ConfigError
from opsd.hooks import RolloutSource, student_answers
from opsd.rollout import RolloutPool
from opsd.teacher.router import Teacher
from opsd.types import Mixture, Prompt, Rollout

NOT_SAMPLED = -1  # policy_version of an answer that is not the student's


def student(rollout_pool: RolloutPool, teacher_pool: Teacher, *, seed: int, max_tokens: int) -> RolloutSource:
    """On-policy: all of them the current student's."""
    return student_answers(rollout_pool, teacher_pool)


def mixed(
    rollout_pool: RolloutPool,
    teacher_pool: Teacher,
    *,
    seed: int,
    max_tokens: int,
    student_share: float = 0.5,
) -> RolloutSource:
    """Each prompt's answer is, with probability `student_share`, the student's, else the file's. GKD, arXiv 2306.13649.

    `student_share` is the paper's lambda; 0 is supervised distillation on the file's answers.
    """
    if not 0.0 <= student_share <= 1.0:
        raise ConfigError(f"answer_options.student_share must be in [0, 1], got {student_share}")

    def answers(prompts: list[Prompt], *, samples_per_prompt: int, step: int) -> Iterator[dict[int, Rollout]]:
        draws = np.random.default_rng([seed, step]).random(len(prompts))
        sampled = [place for place, draw in enumerate(draws) if draw < student_share]
        given = [place for place, draw in enumerate(draws) if draw >= student_share]
        groups = rollout_pool.sample([prompts[p] for p in sampled], samples_per_prompt=samples_per_prompt, step=step)
        from_file = {place * samples_per_prompt: file_answer(prompts[place], max_tokens) for place in given}
        own = moved(groups, lambda i: sampled[i // samples_per_prompt] * samples_per_prompt + i % samples_per_prompt)
        return chain([from_file], own)

    return answers


def teacher_pairs(rollout_pool: RolloutPool, teacher_pool: Teacher, *, seed: int, max_tokens: int) -> RolloutSource:
    """For every answer of the student one of the teacher beside it, of the same number, sampled at temperature 1."""

    def answers(prompts: list[Prompt], *, samples_per_prompt: int, step: int) -> Iterator[dict[int, Rollout]]:
        numbers = occurrences(prompts)
        seeds = [
            sample_seed(seed, step, prompt, samples_per_prompt, number)
            for prompt, number in zip(prompts, numbers, strict=True)
        ]
        own = rollout_pool.sample(prompts, samples_per_prompt=1, step=step)
        teachers = (
            {place: replace(without_student(rollout), sample=numbers[place]) for place, rollout in group.items()}
            for group in teacher_pool.sample(prompts, seeds, max_tokens)
        )
        return chain(moved(teachers, lambda p: 2 * p), moved(own, lambda i: 2 * i + 1))

    return answers


def mixtures(
    rollout_pool: RolloutPool, teacher_pool: Teacher, *, seed: int, max_tokens: int, concentration: float = 0.4
) -> RolloutSource:
    """Beside every answer of the student the same answer mixed with another of the step. MixKD, arXiv 2011.00593.

    Both models read share * own embedding + (1 - share) * the other's, prompt and answer alike; the share is drawn from
    Beta(concentration, concentration), the paper's alpha, as it comes: the larger part may be the other's.
    """
    if not concentration > 0:
        raise ConfigError(f"answer_options.concentration must be greater than 0, got {concentration}")

    def answers(prompts: list[Prompt], *, samples_per_prompt: int, step: int) -> Iterator[dict[int, Rollout]]:
        return pairs(rollout_pool.sample(prompts, samples_per_prompt=samples_per_prompt, step=step), step)

    def pairs(groups: Iterable[dict[int, Rollout]], step: int) -> Iterator[dict[int, Rollout]]:
        own = in_order(groups)
        rng = np.random.default_rng([seed, step])
        shares = rng.beta(concentration, concentration, len(own))
        others = [own[place] for place in rng.permutation(len(own))]
        for place, (rollout, other, share) in enumerate(zip(own, others, shares, strict=True)):
            yield {2 * place: rollout, 2 * place + 1: mixed_with(rollout, other, share)}

    return answers


ANSWERS: dict[str, Callable[..., RolloutSource]] = {
    "student": student,
    "mixed": mixed,
    "teacher_pairs": teacher_pairs,
    "mixtures": mixtures,
}


def moved(groups: Iterable[dict[int, Rollout]], place: Callable[[int], int]) -> Iterator[dict[int, Rollout]]:
    for group in groups:
        yield {place(index): rollout for index, rollout in group.items()}


def file_answer(prompt: Prompt, max_tokens: int) -> Rollout:
    """The file's own answer to a prompt, cut at `max_tokens`."""
    if prompt.response_ids is None:
        raise ConfigError("answers=mixed needs answers in the prompt file: set data.response_key")
    response_ids = prompt.response_ids[:max_tokens]
    nothing = np.zeros(len(response_ids), np.float32)
    return without_student(
        Rollout(
            prompt=prompt,
            sample=0,
            response_ids=response_ids,
            sampled_logprobs=nothing,
            candidate_ids=np.full((len(response_ids), 1), -1, np.int32),
            candidate_logprobs=np.full((len(response_ids), 1), -np.inf, np.float32),
            stopped=len(response_ids) == len(prompt.response_ids),
            policy_version=NOT_SAMPLED,
        )
    )


def mixed_with(rollout: Rollout, other: Rollout, own_share: float) -> Rollout:
    """The rollout with inputs between it and another; past the other's end they are its own."""
    if rollout.prompt.teacher_token_ids is not None:
        raise ConfigError("answers=mixtures needs the same prompt for both models: leave data.teacher_template empty")
    sequence, other_sequence = (np.concatenate([r.prompt.token_ids, r.response_ids]) for r in (rollout, other))
    other_ids = sequence.copy()
    shared = min(len(sequence), len(other_sequence))
    other_ids[:shared] = other_sequence[:shared]
    return replace(without_student(rollout), mixture=Mixture(other_ids=other_ids, own_share=float(own_share)))


def without_student(rollout: Rollout) -> Rollout:
    """The answer alone, with nothing that could pass for the student's opinion of it."""
    shape = (len(rollout), 1)
    return replace(
        rollout,
        sampled_logprobs=np.zeros(len(rollout), np.float32),
        candidate_ids=np.full(shape, -1, np.int32),
        candidate_logprobs=np.full(shape, -np.inf, np.float32),
        candidates=None,
        policy_version=NOT_SAMPLED,
        token_versions=None,
    )
