"""Rates of a run are found again from its metrics, and predict its other splits."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from opsd.errors import ConfigError, DataError
from opsd.plan.simulate.measured import PHASES, measured_rates, read_measured
from opsd.plan.simulate.pipeline import simulate
from tests.opsd.plan.simulate.runs import CORES, OVERHEAD_SHARE, TRUE, WORK, layout, write_run


def test_the_rates_of_a_run_are_found_again(tmp_path):
    run = read_measured(write_run(tmp_path / "run", simulate(WORK, TRUE, layout()).phase_s, layout().split))
    assert run.layout(CORES) == layout()
    assert (run.num_answers, run.prompt_tokens, run.kept_ratio) == (16, 8, 0.5)
    found = measured_rates(
        run, CORES, np.random.default_rng(0), overhead_share=OVERHEAD_SHARE,
        decode_fixed_share=TRUE.decode_step_s / (TRUE.decode_step_s + 16 * TRUE.decode_sequence_s),
    )  # fmt: skip
    expected = replace(TRUE, prefill_tokens_per_s=found.score_tokens_per_s)
    for name, value in asdict(expected).items():
        assert getattr(found, name) == pytest.approx(value, rel=0.15), name


def test_the_run_itself_is_as_long_as_it_was(tmp_path):
    ran = layout(rollout=2, learner=2)
    run = read_measured(write_run(tmp_path / "run", simulate(WORK, TRUE, ran).phase_s, ran.split))
    found = measured_rates(run, CORES, np.random.default_rng(0), decode_fixed_share=0.1, overhead_share=0.9)
    again = simulate(run.work(20, np.random.default_rng(1)), found, ran)
    assert again.seconds_per_step == pytest.approx(run.seconds_per_step, rel=0.03)
    for name in PHASES:
        assert again.phase_s[name] == pytest.approx(run.phase_s[name], rel=0.2), name


def test_another_split_is_predicted_from_the_rates_of_one(tmp_path):
    run = read_measured(write_run(tmp_path / "run", simulate(WORK, TRUE, layout()).phase_s, layout().split))
    found = measured_rates(run, CORES, np.random.default_rng(0), decode_fixed_share=0.5, overhead_share=0.4)
    for split in ((2, 1, 1), (1, 2, 2), (3, 1, 1)):
        other = layout(*split)
        predicted = simulate(run.work(20, np.random.default_rng(1)), found, other).seconds_per_step
        assert predicted == pytest.approx(simulate(WORK, TRUE, other).seconds_per_step, rel=0.1), split


def test_the_head_s_share_does_not_change_what_the_run_measured(tmp_path):
    ran = layout(learner=2)
    run = read_measured(write_run(tmp_path / "run", dict.fromkeys(PHASES, 0.5), ran.split))
    found = measured_rates(
        run, CORES, np.random.default_rng(0), decode_fixed_share=0.5, overhead_share=0.0, head_share=0.4
    )
    work = replace(run.work(20, np.random.default_rng(0)), kept_ratio=0.5)
    assert simulate(work, found, ran).phase_s["learn"] == pytest.approx(0.5, rel=0.02)
    everything = replace(work, kept_ratio=1.0)
    assert simulate(everything, found, ran).phase_s["learn"] == pytest.approx(0.5 / 0.8, rel=0.02)


def test_what_is_no_finished_run_is_refused_in_a_line(tmp_path):
    with pytest.raises(DataError, match=r"nothing/metrics\.jsonl does not exist"):
        read_measured(str(tmp_path / "nothing"))
    short = write_run(tmp_path / "short", dict.fromkeys(PHASES, 0.5), layout().split, steps=3)
    with pytest.raises(ConfigError, match=r"simulate\.run=.*short: .* at least 4 steps, got 3 steps$"):
        read_measured(short)
    without = write_run(tmp_path / "without", dict.fromkeys(PHASES, 0.5), layout().split, answers=[])
    with pytest.raises(ConfigError, match=r"tokens\.jsonl has no answers"):
        read_measured(without)


def test_a_run_whose_phases_overlap_is_refused(tmp_path):
    folder = write_run(tmp_path / "ahead", dict.fromkeys(PHASES, 0.5), layout().split)
    with (tmp_path / "ahead/config.yaml").open("a") as file:
        file.write("schedule: {max_staleness: 1}\n")
    with pytest.raises(ConfigError, match=r"its schedule\.max_staleness=1 has the phases overlap"):
        read_measured(folder)
