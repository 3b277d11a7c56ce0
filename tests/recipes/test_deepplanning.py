"""recipes/deepplanning.sh: the paper's setting, its arms, and its own variables."""

import pytest

from opsd.data.deepplanning.tools import build_tools
from tests.recipes.recipe import start, start_here

PRINTER = '#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n'


@pytest.fixture
def settings_of(tmp_path):
    def settings(*arguments, **variables):
        """name -> value, as the program would get them, the last of each, and what was said on stderr."""
        for name, file in (("student", "config.json"), ("teacher", "config.json"), ("data", "train.parquet")):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).touch()
        (tmp_path / "data" / "val_deepplanning.parquet").touch()
        printer = tmp_path / "printer"
        printer.write_text(PRINTER)
        printer.chmod(0o755)
        places = {"MODEL_PATH": "student", "TEACHER_MODEL_PATH": "teacher", "DATA_DIR": "data"}
        process = start("deepplanning.sh", *arguments, cwd=tmp_path, OPSD_PYTHON=printer, **places, **variables)
        assert process.returncode == 0, process.stderr
        _, _, program, *lines = process.stdout.splitlines()
        assert program == "tip.train"
        return dict(line.split("=", 1) for line in lines), process.stderr

    return settings


def test_the_papers_setting(settings_of, tmp_path):
    settings, said = settings_of()
    assert said == ""
    for name, value in {
        "data.max_prompt_tokens": "8192", "rollout.max_response_tokens": "24576", "data.samples_per_prompt": "16",
        "learner.learning_rate": "1e-6", "rollout.temperature": "1.0", "data.grader": "deepplanning",
        "data.eval_path": f"'{tmp_path}/data/val_deepplanning.parquet'", "selector": "q3", "selector.ratio": "0.20",
        "tools.build": "opsd.data.deepplanning.tools:build_tools", "tools.max_turns": "50",
        "eval.teacher": "false",
    }.items():  # fmt: skip
        assert settings[name] == value
    assert int(settings["learner.micro_batch_tokens"]) >= 8192 + 24576


@pytest.mark.parametrize(
    ("arm", "selector", "ratio"),
    [("all", "all", None), ("entropy50", "entropy", "0.50"), ("q3_20", "q3", "0.20"), ("soft_or50", "soft_or", "0.50")],
)
def test_the_papers_arms(settings_of, arm, selector, ratio):
    settings, _ = settings_of(ARM=arm)
    assert (settings["selector"], settings.get("selector.ratio")) == (selector, ratio)
    assert settings["output_dir"] == f"'outputs/deepplanning-{arm}'"


def test_its_own_variables_become_settings_and_an_answer_is_cut_by_the_tools_that_know_its_rows(settings_of):
    variables = {"MAX_TOOL_RESPONSE_LENGTH": 1024, "MAX_ASSISTANT_TURNS": 9, "AGENT_NUM_WORKERS": 3}
    settings, said = settings_of("tools.max_turns=7", **variables)
    assert said == ""
    assert settings["++tools.options.max_answer_chars"] == settings["tools.max_answer_chars"] == "1024"
    assert (settings["tools.max_turns"], settings["tools.processes"]) == ("7", "3")
    assert build_tools(max_answer_chars=1024).max_answer_chars == 1024


@pytest.mark.parametrize("teacher", ["Qwen/Qwen3-14B", "Qwen/Qwen3-32B"])
def test_plan_only_needs_no_models_and_no_data(teacher):
    process = start_here("deepplanning.sh", PLAN_ONLY=1, TEACHER_MODEL_PATH=teacher)
    assert process.returncode == 0, process.stderr
    assert process.stderr == "" and "learner-0..3" in process.stdout and f"{teacher}, " in process.stdout
