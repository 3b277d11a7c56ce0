"""The learner's computing parts import on a box with torch and transformers alone, as scripts/gpu_check.sh needs."""

import json
import os
import subprocess
from pathlib import Path

import omegaconf
import pytest

import opsd.config.run
from tests.bare_environment import make_bare_environment

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ["ray", "vllm", "hydra", "omegaconf", "datasets", "wandb"]
PRESENT = [
    *(f"opsd.{name}" for name in ("types", "errors", "config.run", "batch", "hooks")),
    *(f"opsd.learner.{name}" for name in ("attention", "model", "optim", "step", "mean", "checkpoint", "packing")),
    *(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sorted(ROOT.glob("opsd/ops/**/[a-z]*.py"))),
    "tip.selectors", "tip.scores", "tip.functional",
]  # fmt: skip
IMPORT_ALL = """
import importlib, importlib.util, json, sys
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
print(json.dumps(failed))
"""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    return make_bare_environment(tmp_path_factory.mktemp("bare"))


def failed_imports(interpreter, names):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [interpreter, "-c", IMPORT_ALL, *names]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow  # a process of its own that imports torch
def test_what_the_gpu_check_uses_imports_without_ray_vllm_and_hydra(interpreter):
    assert failed_imports(interpreter, ABSENT).keys() == set(ABSENT), "this environment is not bare"
    assert failed_imports(interpreter, PRESENT) == {}


def test_a_setting_without_a_default_is_still_omegaconfs():
    assert opsd.config.run.MISSING == omegaconf.MISSING
