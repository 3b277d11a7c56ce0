"""A recipe that is started from a folder of the user's own: its paths, its modules, and this checkout's code."""

import os
import re
import subprocess
import sys

import pytest

from opsd.cluster.warm import actor_search_path
from tests.recipes.recipe import ROOT, start

PRINT_FOLDER = '#!/usr/bin/env bash\nprintf "%s\\n" "$PWD" "$@"\n'


@pytest.fixture
def folder(tmp_path):
    """The user's, with the method of README's section in it, and beside it a package that is named as ours."""
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Your own method") :]
    (tmp_path / "my_method.py").write_text(re.search(r"```python\n(.*?)```", section, re.S)[1])
    (tmp_path / "opsd").mkdir()
    (tmp_path / "opsd" / "__init__.py").write_text("raise ImportError('another checkout')")
    printer = tmp_path / "printer"
    printer.write_text(PRINT_FOLDER)
    printer.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("recipe", ["quickstart.sh", "smollm2.sh"])
def test_relative_paths_are_the_callers(folder, recipe):
    given = ["student.path=mine", "data.train_path=../rows.jsonl", "output_dir=out"]
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        (folder / "gsm8k" / f"{split}.jsonl").touch()
    process = start(recipe, *given, cwd=folder, OPSD_PYTHON="./printer", GSM8K_DIR="gsm8k")
    assert process.returncode == 0, process.stderr
    *_, where, safe, _, program = process.stdout.partition("\noutput_dir=")[0].splitlines()
    assert (where, safe, program) == (str(folder), "-P", "tip.train")
    assert process.stdout.splitlines()[-3:] == given


@pytest.mark.slow
def test_readmes_own_method_is_found_from_the_callers_folder(folder):
    """And not the package of the same name that lies there."""
    settings = [
        "hooks=my_method:build_hooks", "selector.score=surprise", "selector.name=above_mean",
        "loss.divergence=total_variation", "+loss.options={power: 2}",
    ]  # fmt: skip
    assert " ".join(settings[:3]) in (ROOT / "README.md").read_text()
    process = start("quickstart.sh", *settings, cwd=folder, PLAN_ONLY=1)
    assert process.returncode == 0, process.stderr
    assert "learner" in process.stdout


def test_an_actor_has_the_drivers_code_and_the_callers_modules(folder, monkeypatch):
    (folder / "mine.py").write_text("name = 'mine'")
    monkeypatch.chdir(folder)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": actor_search_path()}
    code = "import opsd, mine; print(mine.name, opsd.__path__[0])"
    process = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert process.stdout.split() == ["mine", str(ROOT / "opsd")], process.stderr
