"""The arms on a cluster's recipe: the commands, what becomes of a run's files, and that nothing is made twice."""

import json
import sys

import pytest
import yaml

import scripts.ablation.with_recipe as program
from opsd.evaluation.results import Answer, ProblemResult, write_results
from scripts.ablation.records import read
from scripts.ablation.tables import page

NUM_RIGHT = {"before": (0, 8), "all-0": (4, 8), "q3@0.2-0": (3, 6)}  # of eight answers to two problems
STEP = {"loss": 0.5, "phase_s/learn": 2.0, "kept_ratio": 0.2}
QUADRANTS = {"quadrant_1": 0.4, "quadrant_2": 0.1, "quadrant_3": 0.1, "quadrant_4": 0.4}
KEPT = {"kept_quadrant_1": 0.25, "kept_quadrant_2": 0.0, "kept_quadrant_3": 1.0, "kept_quadrant_4": 0.0}
SUMMARY = {
    "steps": 1, "tokens_trained": 100, "wall_s": 7200.0, "accuracy_before": 0.25, "accuracy_after": 0.5,
    "reverse_kl_before": 1.5, "reverse_kl_after": 0.75,
}  # fmt: skip


def trained(folder):
    folder.mkdir(parents=True)
    settings = {"student": {"path": "/models/s"}, "data": {"eval_path": "/data/test.jsonl"}, "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    lines = [{"step": 0, "eval/accuracy": 0.25}, {**STEP, **QUADRANTS, **KEPT}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluated(folder):
    folder.mkdir(parents=True)
    results = [
        ProblemResult(
            data_source="test",
            row=row,
            reference="1",
            prompt="?",
            answers=tuple(
                Answer(text="", extracted=None, correct=number < right, tokens=1, truncated=False)
                for number in range(8)
            ),
        )
        for row, right in enumerate(NUM_RIGHT[folder.name])
    ]
    write_results(folder / "student.jsonl", results)
    (folder / "summary.json").write_text("{}")


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """Calls the command, in which recipes only leave their files; returns the recipes and their settings."""
    started = []

    def command(args, recipe, *settings, OUTPUT_ROOT, RUN_ID, **variables):
        started.append((recipe, RUN_ID, settings, variables))
        (evaluated if recipe == "eval.sh" else trained)(OUTPUT_ROOT / RUN_ID)

    monkeypatch.setattr(program, "command", command)

    def call(*arguments):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["ablation", str(tmp_path), *arguments])
        program.main()
        return list(started)

    return call


def test_every_arm_is_trained_and_evaluated_once(ablation, tmp_path):
    arms = "--arms", "all", "q3@0.2", "--seeds", "0", "--settings", "num_steps=1"
    started = ablation(*arms)
    assert [(recipe, run) for recipe, run, *_ in started] == [
        ("qwen3_8b_to_4b.sh", "all-0"), ("eval.sh", "before"), ("eval.sh", "all-0"),
        ("qwen3_8b_to_4b.sh", "q3@0.2-0"), ("eval.sh", "q3@0.2-0"),
    ]  # fmt: skip
    assert started[3][2] == ("selector=q3", "selector.ratio=0.2", "num_steps=1", "seed=0", "resume=auto")
    assert started[1][3]["MODEL_PATH"] == "/models/s" and started[1][3]["EVAL_DATA"] == "/data/test.jsonl"
    assert ablation(*arms) == []
    all_tokens, q3 = read(tmp_path)
    assert [each["samples"] for each in all_tokens["evaluations"]] == ["08", "48"]
    assert [each["mean_at_8"] for each in q3["evaluations"]] == [0.5, 0.5625]
    # of the kept fifth 0.4 * 0.25 / 0.2 are in Q1 and 0.1 * 1.0 / 0.2 in Q3
    assert q3["selection"] == pytest.approx({"q1": 0.5, "q2": 0.0, "q3": 0.5, "q4": 0.0})


def test_the_page_says_what_was_measured_and_leaves_the_rest_empty(ablation, tmp_path):
    ablation("--arms", "all", "q3@0.2", "--seeds", "0")
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == page(read(tmp_path))
    assert "## qwen3_8b_to_4b\n\nQwen3-8B teaches Qwen3-4B" in text
    assert "Greedy accuracy of the student before: 0.250" in text
    assert "Cost: 4.00 hours of the machines of a run, 7200 s of it per run" in text
    assert "| `all` | 0.500 | 0.750 |  |  | 0.625 |  | 0.750 |  |" in text
    assert "| `q3@0.2` | 0.50 | 0.00 | 0.50 | 0.00 |  |  |  |  | 2.000 |  |" in text


def test_other_settings_in_the_same_folder_are_refused(ablation, capsys):
    ablation("--arms", "all", "--seeds", "0")
    with pytest.raises(SystemExit):
        ablation("--arms", "all", "--seeds", "0", "--settings", "num_steps=9")
    assert "choose another folder" in capsys.readouterr().err


def test_a_dry_run_prints_the_commands_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation", str(tmp_path), "--dry-run", "--recipe", "llama3_70b_to_8b"])
    program.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * 51  # seeds and arms
    assert lines[0].startswith(f"OUTPUT_ROOT={tmp_path}/runs RUN_ID=all-0 bash ")
    assert lines[0].endswith("recipes/llama3_70b_to_8b.sh selector=all seed=0 resume=auto")
    assert not list(tmp_path.iterdir())
