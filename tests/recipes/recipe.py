"""Starting a recipe as a user does, with the interpreter that runs the tests."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.command_line import command_line

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ["qwen3_8b_to_4b.sh", "llama3_70b_to_8b.sh", "qwen2_5_14b_to_1_5b.sh"]
DISTILLING = [*PAPERS, "todi.sh", "adakd.sh", "kdrl.sh", "opsd_self_distill.sh"]  # on DATA_DIR


def start(recipe, *settings, cwd=ROOT, timeout=300, **variables):
    """The finished process. Nothing of this machine's own settings reaches it but the path and the interpreter."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", ""),
        "PYTHONPATH": str(ROOT),
        "OPSD_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    command = ["bash", str(ROOT / "recipes" / recipe), *settings]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def start_here(recipe, *settings, cwd=ROOT, **variables):
    """As `start`, but the program that the recipe starts runs in this process: it is a second, not ten."""
    with tempfile.TemporaryDirectory() as folder:
        printer = Path(folder) / "python"
        printer.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
        printer.chmod(0o755)
        process = start(recipe, *settings, cwd=cwd, **variables, OPSD_PYTHON=printer)
    if process.returncode:
        return process
    _, _, program, *arguments = process.stdout.splitlines()  # after -P -m
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        run = command_line(program, arguments)
    return SimpleNamespace(returncode=run.returncode, stdout=run.stdout, stderr=process.stderr + run.stderr)
