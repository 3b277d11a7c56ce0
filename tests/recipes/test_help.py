"""--help, --cfg job and their like only look: in a checkout where nothing is installed, and where everything is."""

import os
import shutil
import subprocess

import pytest

from tests.recipes.recipe import DISTILLING, ROOT, start

RECIPES = [*DISTILLING, "deepplanning.sh", "quickstart.sh", "agent_quickstart.sh", "smollm2.sh", "eval.sh"]
SETS = ["ablation.sh", "ablation_gpu.sh"]  # of runs: they take options, not settings


@pytest.fixture
def bare(tmp_path):
    """A checkout without .venv, whose set-up leaves a trace."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("results"))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "setup.sh").write_text("#!/bin/sh\ntouch installed\nexit 1\n")
    (tmp_path / "scripts" / "setup.sh").chmod(0o755)
    return tmp_path


def in_bare(bare, recipe, *arguments):
    command = ["bash", str(bare / "recipes" / recipe), *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": str(bare)}
    process = subprocess.run(command, env=environment, cwd=bare, capture_output=True, text=True, timeout=60)
    assert sorted(path.name for path in bare.iterdir()) == ["recipes", "scripts"]
    return process


@pytest.mark.parametrize("recipe", [*RECIPES, *SETS])
@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_is_text_where_nothing_is_installed(bare, recipe, argument):
    process = in_bare(bare, recipe, argument)
    assert process.returncode == 0, process.stderr
    said = process.stdout.splitlines()
    assert said[0] == f"bash recipes/{recipe} [SETTING=VALUE ...]"
    assert said[-1] == "Every setting with its values and its meaning: docs/settings.md"
    assert any("PLAN_ONLY=1" in line for line in said)
    assert len(said) > 15


@pytest.mark.parametrize("arguments", [("--cfg", "job"), ("--info",), ("--hydra-help",)])
def test_other_looks_say_what_is_missing(bare, arguments):
    process = in_bare(bare, "quickstart.sh", *arguments)
    assert process.returncode == 1
    assert process.stderr == (
        "quickstart.sh: the packages are not installed yet, and this command installs none: run scripts/setup.sh\n"
    )


@pytest.fixture
def printer(tmp_path):
    """An 'interpreter' that notes each call of it."""
    script = tmp_path / "printer.sh"
    script.write_text('#!/usr/bin/env bash\necho "called: $*"\n')
    script.chmod(0o755)
    return script


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("arguments", [("--help",), ("--cfg", "job"), ("--cfg=job",), ("-c", "job"), ("--info",)])
def test_with_the_packages_hydra_answers_and_no_model_is_made(recipe, arguments, printer):
    """No folder of data or models is named: looking needs none."""
    process = start(recipe, *arguments, OPSD_PYTHON=printer, MEASURE_MEMORY=1)
    assert process.returncode == 0, process.stderr
    calls = [line for line in process.stdout.splitlines() if line.startswith("called: ")]
    [call] = calls
    assert call.startswith("called: -P -m tip.train " if recipe != "eval.sh" else "called: -P -m opsd.evaluate ")
    assert call.endswith(" ".join(arguments))


def test_a_recipe_without_them_still_installs_first(bare):
    command = ["bash", str(bare / "recipes" / "quickstart.sh")]
    environment = {"PATH": os.environ["PATH"], "HOME": str(bare)}
    process = subprocess.run(command, env=environment, cwd=bare, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and (bare / "installed").exists()
