"""The plan beside a real run: every process within 25 %."""

import pytest

from tests.recipes.recipe import start


@pytest.mark.long
def test_the_plan_of_the_quick_start_is_within_a_quarter_of_each_processes_peak(tmp_path):
    process = start(
        "quickstart.sh", "num_steps=2", f"output_dir={tmp_path / 'run'}", "eval.num_problems=64", "log.wandb=off",
        "log.dashboard=false", MEASURE_MEMORY=1, timeout=900,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line.split(" | ") for line in process.stdout.splitlines() if line.startswith("| ")][1:]
    ratios = {cells[0].removeprefix("| "): float(cells[-1].removesuffix(" |")) for cells in lines}
    assert ratios.keys() == {"driver", "rollout-0", "teacher-0", "learner-0"}
    assert all(0.75 <= ratio <= 1.25 for ratio in ratios.values()), ratios
