"""The comparison of the simulator with runs, on runs that the simulator wrote."""

import pytest

from bench_simulate import predict, table
from opsd.plan.simulate.measured import read_measured
from opsd.plan.simulate.pipeline import simulate
from tests.opsd.plan.simulate.runs import CORES, TRUE, WORK, layout, write_run


def test_the_table_compares_each_run_with_what_the_first_one_s_rates_predict(tmp_path):
    layouts = [layout(1, 1, 1), layout(2, 1, 1), layout(1, 2, 2)]
    runs = [
        read_measured(write_run(tmp_path / str(number), simulate(WORK, TRUE, each).phase_s, each.split))
        for number, each in enumerate(layouts)
    ]
    [_, *rows] = table(runs, [predict(runs[0], run, CORES) for run in runs])
    assert rows[0][0].endswith("learner 1 (rates from it)") and rows[2][0] == "rollout 1, teacher 2, learner 2"
    for run, row in zip(runs, rows, strict=True):
        assert float(row[1]) == pytest.approx(run.seconds_per_step, abs=1e-3)
        assert 0.85 < float(row[3]) < 1.15
        assert float(row[3]) == pytest.approx(float(row[2]) / float(row[1]), abs=0.01)
