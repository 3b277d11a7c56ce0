"""The raw lines: which runs are there, and what is no line of a run."""

import pytest

from opsd.errors import DataError
from scripts.ablation.arms import ARMS, chosen_arms
from scripts.ablation.records import ROOT, append, missing_runs, raw_file, read
from tests.scripts.ablation.raw_runs import made_up_run


def test_a_run_that_is_there_is_not_made_again(tmp_path):
    runs = [made_up_run(arm, seed, final_share=0.5) for arm in ("all", "todi") for seed in (0, 1)]
    assert missing_runs(runs, read(tmp_path), tmp_path) == runs
    for run in runs[:3]:
        append(tmp_path, run)
    assert read(tmp_path) == runs[:3]
    assert missing_runs(runs, read(tmp_path), tmp_path) == runs[3:]


def test_a_run_with_other_settings_in_its_place_is_refused(tmp_path):
    append(tmp_path, made_up_run("all", 3, final_share=0.5, settings=["selector=all", "num_steps=4"]))
    with pytest.raises(DataError, match=r"sums.jsonl: all with seed 3 ran with selector=all num_steps=4, and now it"):
        missing_runs([made_up_run("all", 3, final_share=0.5)], read(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "su', 'line 2: expected a run as JSON, got \'{"task": "su\''),
        (
            '{"task": "sums"}',
            "line 2: expected a run with task, .*; arm, seed, settings, commit, evaluations is missing",
        ),
        ("[]", "line 2: expected a run with task, .* is missing"),
    ],
)
def test_a_line_that_is_no_run_is_named(tmp_path, line, message):
    append(tmp_path, made_up_run("all", 0, final_share=0.5))
    with raw_file(tmp_path, "sums").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path)


def test_a_run_that_is_there_twice_is_named(tmp_path):
    for _ in range(2):
        append(tmp_path, made_up_run("all", 0, final_share=0.5))
    with pytest.raises(DataError, match="line 2: all with seed 0 of sums is there a second time"):
        read(tmp_path)


def test_the_arms_are_those_that_were_asked_for():
    assert f" {len(ARMS)} arms, " in (ROOT / "README.md").read_text()
    assert [arm.name for arm in chosen_arms(["todi", "random@*"])] == ["todi", "random@0.5", "random@0.2", "random@0.1"]
    assert chosen_arms([]) == list(ARMS.values())
    assert ARMS["dial@0.2"].random == "random@0.2" and ARMS["random@0.2"].random is None and ARMS["all"].random is None
    with pytest.raises(ValueError, match="--arms tood: there is no such arm; there are all, soft, todi"):
        chosen_arms(["tood"])
