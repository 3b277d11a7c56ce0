"""Whose answers per step trains on."""

from dataclasses import replace

import numpy as np
import pytest

from opsd.config.engine import TeacherConfig
from opsd.engines.pool import occurrences, request_seed
from opsd.errors import ConfigError
from opsd.hook_checks import check_hooks
from opsd.types import Prompt, Rollout
from tip.answers import ANSWERS, NOT_SAMPLED, mixed_with
from tip.config import TipRunConfig
from tip.plugin import build_hooks


def make_prompts(count, response=(5, 6, 7, 1)):
    return [
        Prompt(
            index=i,
            token_ids=np.array([2, 3], np.int32),
            text="?",
            answer=None,
            source="test",
            response_ids=None if response is None else np.array(response, np.int32),
        )
        for i in range(count)
    ]


def rollout_of(prompt, sample, version=4):
    return Rollout(
        prompt=prompt,
        sample=sample,
        response_ids=np.array([8, 1], np.int32),
        sampled_logprobs=np.full(2, -1.0, np.float32),
        candidate_ids=np.array([[8, 9], [1, 9]], np.int32),
        candidate_logprobs=np.full((2, 2), -1.0, np.float32),
        stopped=True,
        policy_version=version,
    )


class StudentPool:
    """Answers in groups of two, the last first."""

    def sample(self, prompts, *, samples_per_prompt, step):
        made = [
            rollout_of(prompt, number * samples_per_prompt + sample)
            for prompt, number in zip(prompts, occurrences(prompts), strict=True)
            for sample in range(samples_per_prompt)
        ]
        for start in reversed(range(0, len(made), 2)):
            yield dict(enumerate(made[start : start + 2], start))


class AnsweringTeacher:
    def sample(self, prompts, seeds, max_tokens):
        self.seeds = seeds
        assert len(set(seeds)) == len(prompts)
        yield {place: rollout_of(prompt, 0, version=0) for place, prompt in enumerate(prompts)}


def gather(source, prompts, **request):
    found = {}
    for group in source(prompts, **request):
        assert not found.keys() & group.keys()
        found |= group
    return [found[place] for place in sorted(found)]


def mixed(share, **request):
    source = ANSWERS["mixed"](StudentPool(), None, seed=3, max_tokens=3, student_share=share)
    return gather(source, make_prompts(200), step=0, samples_per_prompt=2, **request)


def test_a_share_of_the_prompts_is_answered_by_the_file():
    answers = mixed(0.25)
    given = [a for a in answers if a.policy_version == NOT_SAMPLED]
    assert 0.6 < len(given) / 200 < 0.9 and len(answers) == len(given) + 2 * (200 - len(given))
    assert [a.prompt.index for a in answers] == sorted(a.prompt.index for a in answers)
    assert all(a.response_ids.tolist() == [5, 6, 7] and not a.stopped for a in given)  # cut at max_tokens
    assert all((a.candidate_ids == -1).all() for a in given)
    again = mixed(0.25)
    assert [a.policy_version for a in again] == [a.policy_version for a in answers]


def test_the_ends_of_the_share_are_on_policy_and_supervised():
    assert all(a.policy_version == 4 for a in mixed(1.0)) and len(mixed(1.0)) == 400
    assert all(a.policy_version == NOT_SAMPLED for a in mixed(0.0)) and len(mixed(0.0)) == 200


def test_pairs_put_the_teacher_before_the_student_for_each_prompt():
    source = ANSWERS["teacher_pairs"](StudentPool(), AnsweringTeacher(), seed=0, max_tokens=8)
    answers = gather(source, make_prompts(5), step=2, samples_per_prompt=1)
    assert [a.prompt.index for a in answers] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [a.policy_version for a in answers] == [NOT_SAMPLED, 4] * 5
    assert all((a.candidate_ids == -1).all() and (a.sampled_logprobs == 0).all() for a in answers[::2])


def test_a_prompt_that_is_there_twice_has_two_pairs_of_different_answers():
    teacher, prompts = AnsweringTeacher(), make_prompts(2)
    source = ANSWERS["teacher_pairs"](StudentPool(), teacher, seed=0, max_tokens=8)
    answers = gather(source, [*prompts, prompts[0]], step=2, samples_per_prompt=1)
    assert [(a.prompt.index, a.sample) for a in answers] == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1)]
    assert teacher.seeds[:2] == [request_seed(0, 3, index, 1) for index in (0, 1)]


def test_a_mixture_stands_beside_every_answer():
    """Its inputs are another answer's up to that one's end, then its own; either share may be the larger."""
    prompts = make_prompts(60)
    answers = gather(
        ANSWERS["mixtures"](StudentPool(), None, seed=0, max_tokens=8), prompts, step=2, samples_per_prompt=1
    )
    assert [a.prompt.index for a in answers] == [i for i in range(60) for _ in range(2)]
    assert all(a.mixture is None and a.policy_version == 4 for a in answers[::2])
    mixed = answers[1::2]
    assert all(a.policy_version == NOT_SAMPLED and (a.candidate_ids == -1).all() for a in mixed)
    shares = [a.mixture.own_share for a in mixed]
    assert min(shares) < 0.5 < max(shares) <= 1.0 and min(shares) >= 0.0 and len(set(shares)) > 50
    one, other = rollout_of(prompts[0], 0), rollout_of(replace(prompts[1], token_ids=np.array([9], np.int32)), 0)
    assert mixed_with(one, other, 0.7).mixture.other_ids.tolist() == [9, 8, 1, 1]
    assert mixed_with(other, one, 0.7).mixture.other_ids.tolist() == [2, 3, 8]
    of_two_weights = replace(one, token_versions=np.array([4, 5], np.int32))
    assert mixed_with(of_two_weights, other, 0.7).version_T.tolist() == [NOT_SAMPLED] * 2


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="answers=mixtures needs teacher.backend=transformers"):
        TipRunConfig(answers="mixtures", stats="learner")
    with pytest.raises(ConfigError, match="answers=mixed needs stats=learner"):
        TipRunConfig(answers="mixed")
    with pytest.raises(ConfigError, match="answers must be one of mixed, mixtures, student, teacher_pairs, got 'file'"):
        build_hooks(TipRunConfig(answers="file", stats="learner"))
    teacher = TeacherConfig(backend="transformers")
    for answers, option, value in (("mixed", "student_share", 1.5), ("mixtures", "concentration", 0.0)):
        cfg = TipRunConfig(answers=answers, answer_options={option: value}, stats="learner", teacher=teacher)
        with pytest.raises(ConfigError, match=f"answer_options.{option} must be .*, got {value}"):
            check_hooks(build_hooks(cfg), cfg)
    source = ANSWERS["mixed"](StudentPool(), None, seed=0, max_tokens=8, student_share=0.0)
    with pytest.raises(ConfigError, match="set data.response_key"):
        gather(source, make_prompts(2, response=None), step=0, samples_per_prompt=1)
