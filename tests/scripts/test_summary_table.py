"""The table of runs: one line each, and what several seeds of an arm come to."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "plain-0": 1.0,
    "plain-1": 1.4,
    "plain-2": 1.2,
    "hidden-0": 0.5,
    "hidden-1": 1.1,
    "hidden-2": 0.8,
    "other": 9.0,
}


@pytest.fixture
def runs(tmp_path):
    for name, value in VALUES.items():
        summary = {
            "config": {"selector": {"name": "top_ratio", "score": "soft_or", "ratio": 0.5}},
            "seed": int(name[-1]) if name[-1].isdigit() else 0,
            "accuracy_before": None, "accuracy_after": None, "teacher_accuracy": None,
            "reverse_kl_before": 3.0, "reverse_kl_after": value,
            "top1_agreement_before": 0.1, "top1_agreement_after": 0.25,
            "kept_ratio": 0.5, "steps": 24, "wall_s": 10.0, "phase_s": {"other": 1.0, "learn": 9.0},
        }  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def table(*runs):
    process = subprocess.run(
        [sys.executable, ROOT / "scripts" / "summary_table.py", *runs], capture_output=True, text=True, cwd=ROOT
    )
    return process.returncode, process.stdout.splitlines(), process.stderr


def test_every_run_has_a_line(runs):
    code, lines, _ = table(*(runs / name for name in VALUES))
    assert code == 0
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:9]] == list(VALUES)
    assert (
        lines[8] == "| other | soft_or 0.5 | 0 | – | – | – | 3.000 | 9.000 | 0.100 | 0.250 | 0.500 | 24 | 10 | 10.0% |"
    )


def test_seeds_of_an_arm_have_means_and_differences_with_intervals(runs):
    """Differences -0.5, -0.3, -0.4: mean -0.4, standard error 0.1 / sqrt 3, t 4.303."""
    _, lines, _ = table(*(runs / name for name in VALUES))
    assert lines[10:12] == [
        "| arm | measure | seeds | mean [95 %] | less plain's, by seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    assert lines[12] == "| plain | reverse KL after | 3 | 1.200 [0.703, 1.697] |  |"
    assert "| hidden | reverse KL after | 3 | 0.800 [0.055, 1.545] | -0.400 [-0.648, -0.152] |" in lines
    assert "| hidden | top-1 after | 3 | 0.250 [0.250, 0.250] | 0.000 [0.000, 0.000] |" in lines
    assert len(lines) == 16  # `other` is no arm


def test_single_runs_have_one_table(runs):
    _, lines, _ = table(runs / "plain-0", runs / "hidden-0")
    assert len(lines) == 4


def test_a_run_that_has_not_ended_is_named(runs):
    (runs / "plain-1" / "summary.json").unlink()
    code, _, error = table(runs / "plain-0", runs / "plain-1")
    assert code == 1 and error == f"error: {runs}/plain-1/summary.json does not exist: has the run ended?\n"
