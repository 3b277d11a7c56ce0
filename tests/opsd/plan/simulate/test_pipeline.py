"""The discrete-event model against closed forms."""

from dataclasses import replace

import numpy as np
import pytest

from opsd.plan.simulate.clock import Clock
from opsd.plan.simulate.parts import Layout, Rates, Split, Work
from opsd.plan.simulate.pipeline import simulate
from opsd.plan.simulate.services import Answer, Requests, RolloutEngine

ONE_OF_EACH = Layout(split=Split(rollout=1, teacher=1, learner=1), group_size=1000)
RATES = Rates(
    decode_step_s=0.01, decode_sequence_s=0.001, prefill_tokens_per_s=1000.0, score_tokens_per_s=500.0,
    learn_tokens_per_s=200.0, score_batch_s=0.25, select_s=0.5, sync_s=0.125,
)  # fmt: skip
# One sequence at a time, one token a second: an engine is a queue with one server.
SERIAL = replace(RATES, decode_step_s=1.0, decode_sequence_s=0.0, prefill_tokens_per_s=1e9, score_tokens_per_s=1e9,
                 learn_tokens_per_s=1e9, score_batch_s=0.0, select_s=0.0, sync_s=0.0)  # fmt: skip


def equal(answers=8, tokens=100, steps=6, prompt=10, **work):
    return Work(lengths=np.full((steps, answers), tokens), prompt_tokens=prompt, **work)


def test_one_engine_and_equal_lengths_take_the_sum_of_the_phases():
    outcome = simulate(equal(), RATES, ONE_OF_EACH)
    phases = {
        "rollout": 8 * 10 / 1000 + 100 * (0.01 + 8 * 0.001), "score": 0.25 + 8 * 110 / 500, "select": 0.5,
        "learn": 8 * 110 / 200, "sync": 0.125,
    }  # fmt: skip
    assert outcome.phase_s == pytest.approx(phases)
    seconds = sum(phases.values())
    assert outcome.seconds_per_step == pytest.approx(seconds)
    assert outcome.tokens_per_s == pytest.approx(800 / seconds)
    assert outcome.idle == pytest.approx(
        {
            "rollout": 1 - (phases["rollout"] + 0.125) / seconds,
            "teacher": 1 - phases["score"] / seconds,
            "learner": 1 - (phases["learn"] + 0.125) / seconds,
        }
    )


def test_a_full_engine_takes_its_answers_in_rounds():
    layout = replace(ONE_OF_EACH, max_num_seqs=3)
    phase_s = simulate(equal(), RATES, layout).phase_s
    rounds = 2 * 100 * (0.01 + 3 * 0.001) + 100 * (0.01 + 2 * 0.001)
    assert phase_s["rollout"] == pytest.approx(8 * 10 / 1000 + rounds)


def test_a_short_answer_makes_room_for_the_long_one():
    work = Work(lengths=np.array([[30, 100]] * 4), prompt_tokens=10)
    phase_s = simulate(work, RATES, replace(ONE_OF_EACH, group_size=1)).phase_s
    assert phase_s["rollout"] == pytest.approx(0.02 + 30 * (0.01 + 2 * 0.001) + 70 * (0.01 + 0.001))
    # The short one was scored while the long one was written.
    assert phase_s["score"] == pytest.approx(0.25 + 110 / 500)


def test_batches_of_the_teacher_hold_no_more_than_they_may():
    phase_s = simulate(equal(), RATES, replace(ONE_OF_EACH, max_batch_tokens=350)).phase_s
    assert phase_s["score"] == pytest.approx(3 * 0.25 + 8 * 110 / 500)


def test_ranks_share_a_step_and_the_head_works_on_kept_tokens_alone():
    rates = replace(RATES, head_share=0.4)
    layout = replace(ONE_OF_EACH, split=Split(rollout=1, teacher=1, learner=4))
    phase_s = simulate(equal(kept_ratio=0.25), rates, layout).phase_s
    assert phase_s["learn"] == pytest.approx(8 * 110 / 200 / 4 * (0.6 + 0.4 * 0.25))


def test_workers_that_share_a_core_are_slower_together():
    layout = replace(ONE_OF_EACH, split=Split(rollout=4, teacher=1, learner=2), group_size=2, num_devices=2)
    phase_s = simulate(equal(), RATES, layout).phase_s
    alone = 2 * 10 / 1000 + 100 * (0.01 + 2 * 0.001)
    assert phase_s["rollout"] == pytest.approx(2 * alone)  # four engines on two cores
    assert phase_s["learn"] == pytest.approx(8 * 110 / 200 / 2)  # two ranks have a core each
    assert phase_s["sync"] == pytest.approx(2 * 0.125)  # into four engines


def test_shared_time_is_seconds_where_jobs_come_and_go():
    ends = {}
    clock = Clock(num_devices=1)

    def job(name, seconds, then=lambda: None, **more):
        clock.start(seconds, lambda: (ends.setdefault(name, clock.now), then()), role=name, **more)

    job("long", 3.0)
    job("short", 1.0, lambda: job("later", 0.5))
    job("without a device", 0.5, devices=0)
    clock.run()
    # Two share the core for 2 s, then the long one and the later for 1 s, then the long one has it.
    assert ends == pytest.approx({"without a device": 1.0, "short": 2.0, "later": 3.0, "long": 4.5})
    assert clock.worked_s == pytest.approx({"without a device": 1.0, "short": 2.0, "later": 1.0, "long": 4.5})


# rollout : score : learn = 4 : 1 : 2, of one step
UNEVEN = dict(score_tokens_per_s=8 * 110 / 1.0, learn_tokens_per_s=8 * 110 / 2.0)


@pytest.mark.parametrize(("staleness", "seconds"), [(0, 7.0), (1, 4.0), (2, 4.0)])
def test_overlap_reaches_the_rate_of_the_slowest_role(staleness, seconds):
    rates = Rates(decode_step_s=4.0 / 100, decode_sequence_s=0.0, prefill_tokens_per_s=1e12, **UNEVEN)
    outcome = simulate(equal(steps=12), rates, replace(ONE_OF_EACH, max_staleness=staleness))
    assert outcome.seconds_per_step == pytest.approx(seconds)
    assert outcome.idle == pytest.approx(
        {"rollout": 1 - 4 / seconds, "teacher": 1 - 1 / seconds, "learner": 1 - 2 / seconds}
    )


@pytest.mark.parametrize(("staleness", "seconds"), [(1, 3.5), (2, 3.0)])
def test_rollouts_wait_where_they_are_so_many_steps_ahead(staleness, seconds):
    """All roles take 3, 1 and 3 s: with one step of staleness a batch's way of 7 s holds two batches, not three."""
    rates = Rates(
        decode_step_s=3.0 / 100, decode_sequence_s=0.0, prefill_tokens_per_s=1e12, score_tokens_per_s=8 * 110 / 1.0,
        learn_tokens_per_s=8 * 110 / 3.0,
    )  # fmt: skip
    layout = replace(ONE_OF_EACH, max_staleness=staleness)
    assert simulate(equal(steps=40), rates, layout).seconds_per_step == pytest.approx(seconds, rel=0.01)


def tailed(generator, steps=4, answers=64):
    """One answer in thirty-two is twenty times as long as the others; in the file's order they stand together."""
    lengths = np.full((steps, answers), 10)
    lengths[:, : answers // 32] = 200
    return Work(lengths=lengths, prompt_tokens=1)


def test_pulled_work_is_within_a_tenth_of_the_bound_where_dealt_work_is_not():
    work = tailed(np.random.default_rng(0))
    split = Split(rollout=4, teacher=1, learner=1)
    bound = work.response_tokens / 4
    seconds = {
        dispatch: simulate(
            work, SERIAL, replace(ONE_OF_EACH, split=split, dispatch=dispatch, max_num_seqs=1)
        ).phase_s["rollout"]
        for dispatch in ("dealt", "pulled")
    }  # fmt: skip
    assert seconds["dealt"] == pytest.approx(2 * 200 + 14 * 10, rel=1e-3)  # the first engine has both long ones
    assert bound <= seconds["pulled"] <= 1.1 * bound


def test_pulling_engines_take_no_more_than_makes_them_level():
    layout = replace(ONE_OF_EACH, split=Split(rollout=2, teacher=1, learner=1), dispatch="pulled")
    phase_s = simulate(equal(), RATES, layout).phase_s
    assert phase_s["rollout"] == pytest.approx(4 * 10 / 1000 + 100 * (0.01 + 4 * 0.001))


def test_an_engine_does_what_it_is_given_one_after_another():
    """Two answers at a time; new weights go in between the requests of two steps, which do not mix."""
    clock, ended_s = Clock(), []
    rates, layout = replace(SERIAL, sync_s=3.0), replace(ONE_OF_EACH, max_num_seqs=2, group_size=1)
    engine = RolloutEngine(clock, rates, layout, 0, lambda answers: ended_s.append(clock.now))
    engine.give(Requests([Answer(0, tokens) for tokens in (10, 20, 5)], 1))
    engine.give(None)
    engine.give(Requests([Answer(1, 7)], 1))
    clock.run()
    assert ended_s == pytest.approx([10, 15, 20, 20 + 3 + 7])


def test_groups_are_as_large_as_they_must_be_and_the_last_is_what_is_left():
    clock, sizes = Clock(), []
    engine = RolloutEngine(clock, SERIAL, replace(ONE_OF_EACH, group_size=3), 0, lambda group: sizes.append(len(group)))
    engine.give(Requests([Answer(0, tokens) for tokens in (1, 2, 3, 3, 5)], 1))
    clock.run()
    assert sizes == [4, 1]
