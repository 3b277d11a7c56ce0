"""What the plan prints of a simulation, and what it refuses."""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from opsd.errors import ConfigError
from opsd.plan.cluster import ClusterConfig
from opsd.plan.program import print_simulation
from opsd.plan.simulate.config import SimulateConfig
from opsd.plan.simulate.estimated import GPUS, estimated_rates
from opsd.plan.simulate.lengths import log_normal
from opsd.plan.simulate.scenario import room, scenario
from opsd.plan.simulate.text import simulation_text
from tests.opsd.plan.jobs import gpu_job

FAST = dict(num_steps=5, max_staleness=1)
GIVEN = dict(
    decode_step_s=0.01, decode_sequence_s=1e-4, prefill_tokens_per_s=1e5, score_tokens_per_s=2e4,
    learn_tokens_per_s=1e4,
)  # fmt: skip


JOB = cache(gpu_job)  # its models' sizes take a second to read


def small(*, cluster=None, **sections):
    """A job with few answers: the simulation's time is theirs."""
    return changed(cluster=cluster, data={"prompts_per_step": 4, "samples_per_prompt": 4}, **sections)


def changed(*, cluster=None, **sections):
    job = JOB()
    cfg = replace(job.cfg, **{name: replace(getattr(job.cfg, name), **each) for name, each in sections.items()})
    [teacher] = job.teachers
    teachers = (replace(teacher, config=cfg.teacher),)
    return replace(job, cfg=cfg, teachers=teachers, cluster=cluster or job.cluster)


def rows(text):
    """(split, what it is, staleness, seconds per step, tokens/s, idle shares) of every line of the table."""
    row = r"^(rollout \d+, teacher \d+, learner \d+)  (.+?) +(\d) +([\d.,]+) +([\d,]+) +(\d+)% +(\d+)% +(\d+)%$"
    return re.findall(row, text, re.MULTILINE)


def test_the_table_has_these_settings_and_the_best_split_at_every_staleness():
    text = simulation_text(small(), SimulateConfig(gpu="h100", **FAST))
    assert "estimated from an H100's data sheet and assumptions, none of it measured" in text
    assert "log-normal, median 2,048, 99 % below 8,192, cut at 8,192 (assumed)" in text
    table = rows(text)
    assert [(split, what.strip(), staleness) for split, what, staleness, *_ in table[:2]] == [
        ("rollout 2, teacher 2, learner 4", "these settings", "0"),
        ("rollout 2, teacher 2, learner 4", "the same split", "1"),
    ]
    assert [(what.strip(), staleness) for _, what, staleness, *_ in table[2:]] == [
        ("best of 8 GPUs", "0"), ("best of 8 GPUs", "1"),
    ]  # fmt: skip
    seconds = [float(row[3]) for row in table]
    assert seconds[2] <= seconds[0] and seconds[3] <= seconds[1]
    best = re.search(r"^best +(rollout .*), staleness (\d): ([\d.]+) s per step, ([\d.]+) x", text, re.MULTILINE)
    assert float(best[3]) <= 1.03 * min(seconds)
    assert float(best[4]) == pytest.approx(seconds[0] / float(best[3]), rel=0.02)


def test_a_rate_that_is_given_goes_before_the_estimate():
    found = scenario(small(), SimulateConfig(gpu="h100", sync_s=7.0, **FAST))
    assert found.rates.sync_s == 7.0 and found.rates.select_s > 0
    assert found.rates_from.endswith("given (simulate.sync_s)")
    given = scenario(small(), SimulateConfig(**GIVEN, **FAST))
    assert {name: getattr(given.rates, name) for name in GIVEN} == GIVEN
    assert given.rates_from.startswith("given (")


def test_a_larger_model_is_slower_and_an_engine_on_more_gpus_faster():
    def rates(gpu="h100", **sections):
        return estimated_rates(changed(**sections), GPUS[gpu], response_tokens=1e5, context_tokens=1000)

    plain, wide = rates(), rates(rollout={"tensor_parallel_size": 2})
    assert wide.decode_step_s < plain.decode_step_s and wide.decode_sequence_s < plain.decode_sequence_s
    assert wide.prefill_tokens_per_s == pytest.approx(2 * plain.prefill_tokens_per_s)
    assert rates("b200").learn_tokens_per_s > plain.learn_tokens_per_s
    assert rates(learner={"activation_checkpointing": False}).learn_tokens_per_s == pytest.approx(
        plain.learn_tokens_per_s * 8 / 6
    )
    # Qwen3-8B has 8.19 billion parameters, Qwen3-4B 4.02: a token costs the teacher's engine twice as much.
    assert plain.prefill_tokens_per_s / plain.score_tokens_per_s == pytest.approx(8.19 / 4.02, rel=0.01)


def test_the_lengths_have_their_median_and_tail():
    drawn = log_normal((100, 500), median=300, tail=6000, longest=8000, generator=np.random.default_rng(0))
    assert np.median(drawn) == pytest.approx(300, rel=0.03)
    assert (drawn < 6000).mean() == pytest.approx(0.99, abs=0.002)
    assert drawn.max() == 8000 and drawn.min() >= 1


def test_the_cache_bounds_what_a_rollout_engine_runs_at_once():
    cfg = SimulateConfig(gpu="h100", median_tokens=8000, tail_tokens=8100, prompt_tokens=200, **FAST)
    most = scenario(small(), cfg).layout.max_num_seqs
    assert 45 <= most <= 60  # its plan: 442,800 tokens
    assert scenario(small(rollout={"max_num_seqs": 8}), cfg).layout.max_num_seqs == 8


def test_the_learner_s_memory_bounds_the_splits():
    assert room(small()).fewest_ranks == 1
    assert (
        room(small(cluster=ClusterConfig(gib_per_gpu=40.0), teacher={"gpu_memory_utilization": 0.85})).fewest_ranks == 3
    )


@pytest.mark.parametrize(
    ("cluster", "sections", "said"),
    [
        ({"gpus_per_node": 2}, {}, r"no split of 2 GPUs is possible: a rollout engine needs 1, a teacher's engine 1, "
                                   r"the learner at least 1$"),
        ({"gib_per_gpu": 10.0}, {}, r"no split of 8 GPUs of 10 GiB is possible: rollout, teacher does not fit"),
        ({}, {"teacher": {"by_source": {"a": {}}}}, r"teacher\.by_source has several teachers"),
    ],
)  # fmt: skip
def test_an_impossible_split_is_a_line(cluster, sections, said):
    job = small(cluster=ClusterConfig(**cluster), **sections)
    [problem] = print_simulation(job, SimulateConfig(gpu="h100", **FAST))
    assert re.search(said, problem) and "\n" not in problem


def test_settings_that_need_more_gpus_than_there_are_have_no_line_of_their_own():
    text = simulation_text(small(teacher={"num_workers": 4}), SimulateConfig(gpu="h100", **FAST))
    assert {what.strip() for _, what, *_ in rows(text)} == {"best of 8 GPUs"}


def test_colocated_roles_are_synchronous():
    job = small(rollout={"num_workers": 4}, teacher={"num_workers": 4}, placement={"mode": "colocated"})
    own = [row for row in rows(simulation_text(job, SimulateConfig(gpu="h100", **FAST))) if "colocated" in row[1]]
    assert [(split, staleness) for split, _, staleness, *_ in own] == [("rollout 4, teacher 4, learner 4", "0")]


def test_a_run_on_the_cpu_has_its_own_split_alone():
    job = replace(small(cluster=ClusterConfig(host_gib=64.0, cores=3)), device="cpu")
    text = simulation_text(job, SimulateConfig(**GIVEN, **FAST))
    assert "all workers share 3 cores" in text
    assert [what.strip() for _, what, *_ in rows(text)] == ["these settings", "the same split"]


def test_what_is_best_is_compared_with_the_staleness_of_these_settings():
    own = small(schedule={"max_staleness": 1})
    text = simulation_text(own, SimulateConfig(gpu="h100", **FAST))
    assert [what.strip() for _, what, *_ in rows(text)[:2]] == ["the same split", "these settings"]
    assert text.endswith("x as fast as rollout 2, teacher 2, learner 4, staleness 1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gpu": "h900"}, r"simulate\.gpu must be one of a100, h100"),
        ({"run": "out", "gpu": "h100"}, r"simulate\.run=out and simulate\.gpu=h100: take the rates from one of them"),
        ({"num_steps": 5}, r"simulate\.num_steps must be at least 8, got 5"),
        ({"median_tokens": 90, "tail_tokens": 80}, r"simulate\.tail_tokens must be at least 90, got 80"),
        ({"score_tokens_per_s": 0.0}, r"simulate\.score_tokens_per_s must be greater than 0"),
        ({"sync_s": -1.0}, r"simulate\.sync_s must be at least 0"),
        ({"dispatch": "thrown"}, r"simulate\.dispatch must be one of pulled, dealt"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(settings, said):
    with pytest.raises(ConfigError, match=said):
        SimulateConfig(**settings)


def test_the_staleness_of_these_settings_must_be_among_those_simulated():
    job = small(schedule={"max_staleness": 3})
    with pytest.raises(
        ConfigError, match=r"simulate\.max_staleness=1 leaves out .*: set simulate\.max_staleness=3 sim"
    ) as e:
        scenario(job, SimulateConfig(gpu="h100", **FAST))
    advised = dict(re.findall(r"simulate\.(\w+)=(\d+)", str(e.value).partition(": set ")[2]))
    scenario(job, SimulateConfig(gpu="h100", **{name: int(value) for name, value in advised.items()}))


def test_a_rate_that_is_missing_is_named():
    with pytest.raises(ConfigError, match=r"simulate\.learn_tokens_per_s is missing: give it, or simulate\.run or"):
        scenario(small(), SimulateConfig(**{**GIVEN, "learn_tokens_per_s": None}, **FAST))


def test_without_rates_nothing_is_simulated(capsys):
    assert print_simulation(small(), SimulateConfig(num_steps=30)) == []
    assert capsys.readouterr().out == ""
