"""Every method trains the quick start's pair for 20 steps from its YAML line alone: real engines, actors, ranks."""

import json
import math
import os
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(path.name.removesuffix(".yaml") for path in (files("tip.conf") / "method").iterdir())
# No distance that falls: only the loss's gradient has a meaning (kdrl*, dpkd, sign_log, power, sign_gate, opsa), the
# window grows into the harder end of the answers (horizon), the second half has another divergence (paced), the few
# tokens that are farthest off are other ones in each step (sparse_advantage).
NOT_MINIMISED = {
    *("kdrl", "kdrl_advantage", "kdrl_mask", "dpkd", "sign_log", "power", "sign_gate", "opsa"),
    "horizon",
    "paced",
    "sparse_advantage",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all the runs are started, so that the recipe makes each of its pairs once."""
    return tmp_path_factory.mktemp("caller")


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_method_trains(folder, tmp_path, method):
    command = ["bash", str(ROOT / "recipes" / "quickstart.sh"), f"method={method}", f"output_dir={tmp_path / 'run'}"]
    # At the recipe's own rate the loss rises for some ten steps first.
    command += ["num_steps=20", "learner.learning_rate=5e-4", "eval.num_problems=0", "eval.every=0"]
    command += ["log.wandb=off", "log.dashboard=false"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    if method not in NOT_MINIMISED:
        assert sum(losses[-5:]) < sum(losses[:5]), losses
