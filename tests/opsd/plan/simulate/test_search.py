"""The search for the best split against all splits, and what it may use."""

from dataclasses import replace

import numpy as np
import pytest

from opsd.plan.simulate import search
from opsd.plan.simulate.lengths import log_normal
from opsd.plan.simulate.parts import Layout, Rates, Split, Work
from opsd.plan.simulate.pipeline import simulate
from opsd.plan.simulate.search import Room, best_split, ideal_seconds

LAYOUT = Layout(split=Split(rollout=1, teacher=1, learner=1), max_num_seqs=8)
RATES = Rates(
    decode_step_s=0.01, decode_sequence_s=0.001, prefill_tokens_per_s=1e4, score_tokens_per_s=3e3,
    learn_tokens_per_s=1.5e3, select_s=0.1, sync_s=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def work():
    generator = np.random.default_rng(0)
    return Work(lengths=log_normal((8, 16), median=80, tail=400, longest=400, generator=generator), prompt_tokens=10)


def room(num_gpus, **changed):
    return Room(
        **{"num_gpus": num_gpus, "rollout_gpus": 1, "teacher_gpus": 1, "teachers": 0, "fewest_ranks": 1, **changed}
    )


def searched(work, staleness):
    """As many steps as the search looks at."""
    return replace(work, lengths=work.lengths[: search.SEARCHED_STEPS * (staleness + 1)])


def test_every_gpu_of_a_split_has_work_and_the_learner_its_memory():
    splits = list(room(16, rollout_gpus=2, teacher_gpus=4, fewest_ranks=3).splits())
    assert {2 * s.rollout + 4 * s.teacher + s.learner for s in splits} == {16}
    assert all(split.learner >= 3 for split in splits)
    assert sorted((s.rollout, s.teacher) for s in splits) == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1)]


def test_servers_elsewhere_take_no_gpu():
    splits = list(room(4, teacher_gpus=0, teachers=3).splits())
    assert [(s.rollout, s.teacher, s.learner) for s in splits] == [(1, 3, 3), (2, 3, 2), (3, 3, 1)]


@pytest.mark.parametrize("staleness", [0, 1])
def test_of_few_splits_the_best_is_found(work, staleness):
    layout, work = replace(LAYOUT, max_staleness=staleness), searched(work, staleness)
    every = {split: simulate(work, RATES, replace(layout, split=split)) for split in room(8).splits()}
    split, outcome = best_split(work, RATES, layout, room(8))
    assert outcome.seconds_per_step == min(each.seconds_per_step for each in every.values())
    assert every[split] == outcome


@pytest.mark.parametrize("staleness", [0, 1])
def test_of_many_splits_one_as_good_as_the_best_is_found_without_simulating_all(work, staleness, monkeypatch):
    layout, work = replace(LAYOUT, max_staleness=staleness), searched(work, staleness)
    splits = list(room(12).splits())
    best = min(simulate(work, RATES, replace(layout, split=split)).seconds_per_step for split in splits)
    simulated = []
    monkeypatch.setattr(search, "simulate", lambda *given: simulated.append(given) or simulate(*given))
    _, outcome = best_split(work, RATES, layout, room(12))
    assert outcome.seconds_per_step <= 1.05 * best
    assert len(simulated) < 0.7 * len(splits)


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_no_split_is_faster_than_ideal_work(work, staleness):
    for split in room(8).splits():
        layout = replace(LAYOUT, split=split, max_staleness=staleness)
        steady = replace(work, lengths=np.tile(work.lengths, (2, 1)))  # its filling and draining weigh little
        assert simulate(steady, RATES, layout).seconds_per_step >= 0.97 * ideal_seconds(work, RATES, layout)
