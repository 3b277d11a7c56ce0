"""What may import what: the arrows between folders run down only, and what a laptop uses loads no Ray."""

import ast
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# From the top; a folder, or a module beside the folders. Whoever stands in one line may know the lines below it.
LAYERS = [
    {"train"},
    {"run", "evaluate"},
    {"run_parts", "run_state", "run_summary", "saver"},
    {"evaluation", "plan", "report", "export", "stopping"},
    {"hooks", "hook_checks", "preflight", "weight_sync", "run_inputs"},
    {"teacher", "rollout", "ahead", "agents"},
    {"engines", "learner"},
    {"data", "cluster", "monitor", "run_folder", "batch", "payload", "score_checks", "checkpoints", "run_lock"},
    {"ops", "config", "models"},
    {"types", "sequences", "errors", "files", "strict_json"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_RAY = ("report", "plan", "models", "config", "ops", "teacher.remote")
# The libraries are loaded once, and each package in a fork of a process that has nothing of ours yet.
IMPORT = """
import importlib, json, os, pkgutil, sys
import numpy, torch, transformers
names = sys.argv[1].split(",")
for root in sys.argv[2:]:
    before = [name for name in names if name in sys.modules]
    if os.fork() == 0:
        package = importlib.import_module(root)
        for module in pkgutil.walk_packages(package.__path__, root + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        print(json.dumps([root, [name for name in names if name in sys.modules]]), flush=True)
        os._exit(0)
    assert not before and os.wait()[1] == 0, (root, before)
"""


def imports():
    """(file, room of the importing module, room of the imported one), within opsd."""
    for path in sorted((ROOT / "opsd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            own = path.relative_to(ROOT / "opsd").parts[0].removesuffix(".py")
            for module in modules:
                if module.startswith("opsd."):
                    yield str(path.relative_to(ROOT)), own, module.split(".")[1]


def test_every_room_has_its_layer():
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "opsd").iterdir() if not path.name.startswith("_")}
    assert rooms - {"conf", "README.md"} == set(LEVEL)


def test_imports_run_down():
    up = [f"{file} imports opsd.{to}" for file, own, to in imports() if own in LEVEL and LEVEL[own] > LEVEL[to]]
    assert not up


def test_no_two_rooms_import_each_other():
    known: dict[str, set[str]] = {}
    for _, own, to in imports():
        if own != to:
            known.setdefault(own, set()).add(to)
    try:
        TopologicalSorter(known).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.fixture(scope="module")
def loaded():
    """By package, which of the modules below a fresh process has after all of it was imported."""
    packages = [f"opsd.{name}" for name in (*WITHOUT_RAY, "evaluation")]
    command = [sys.executable, "-c", IMPORT, "ray,vllm,tip,opsd.run", *packages]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    return dict(json.loads(line) for line in process.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("package", WITHOUT_RAY)
def test_what_needs_no_cluster_loads_no_ray(loaded, package):
    assert not {"ray", "vllm", "tip"} & set(loaded[f"opsd.{package}"])


@pytest.mark.slow
def test_the_evaluation_does_not_load_the_training_run(loaded):
    assert not {"opsd.run", "tip"} & set(loaded["opsd.evaluation"])
    assert "opsd.run" not in ast.dump(ast.parse((ROOT / "opsd" / "evaluate.py").read_text()))
