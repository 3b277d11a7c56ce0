"""Every benchmark still runs: at its smallest, on models made on the spot. Nobody looks at what it measures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_pair

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[3]
ON_PAIR = "PAIR PAIR/prompts.jsonl --max-tokens 8 --top-k 8"
# Each prints a table at its end; the others have tests of their own.
BENCHES = {
    "bench_services": f"{ON_PAIR} --num-rollouts 8 --repeats 1 --num-candidates 8 --group-sizes 4",
    "bench_scoring_memory": "PAIR PAIR/prompts.jsonl --lengths 64 96 --top-k 8 --num-candidates 8 --dtype float32",
    "bench_variance": f"{ON_PAIR} --num-rollouts 2",
    "bench_step": "--tokens 256 --prompt-tokens 16 --response-tokens 48 --micro-batch-tokens 64 --layers 1 --repeats 1",
    "bench_overlap": "--unit-s 0.02 --steps 4 --prompts 40 --token-s 0.001",
    "pipeline": "--tokens 20000 --length 200 --steps 2",
    "agents": "--trajectories 4 --calls 1 --tool-s 0.05",
}


@pytest.mark.parametrize("name", BENCHES)
def test_it_ends_with_a_table(name, tmp_path):
    pair = make_tiny_pair(tmp_path)
    command = [
        sys.executable,
        ROOT / "scripts" / "bench" / f"{name}.py",
        *BENCHES[name].replace("PAIR", str(pair)).split(),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    last = [line for line in process.stdout.splitlines() if line.strip()][-1]
    assert last.startswith("|") and last.endswith("|")
