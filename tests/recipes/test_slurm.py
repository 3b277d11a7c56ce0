"""recipes/slurm.sbatch as Slurm would run it, with stand-ins for Slurm, Ray and the set-up."""

import os
import subprocess
from pathlib import Path

import pytest

SBATCH = Path(__file__).resolve().parents[2] / "recipes" / "slurm.sbatch"
FILES = {
    "bin/scontrol": "printf '%s\\n' n1 n2 n3",
    # The step's options into the log, then the step itself, on this machine.
    "bin/srun": """
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
[[ $1 == cat ]] || echo "${options[*]} | $*" >>"$LOG"
exec "$@"
""",
    "scripts/setup.sh": 'echo setup >>"$LOG"',
    "scripts/ray_cluster.sh": """
if [[ $1 == head ]]; then
    mkdir -p "$RAY_CLUSTER_DIR"
    : >"$RAY_CLUSTER_DIR/ray_current_cluster" # the file is there before its text is
    sleep 0.5
    echo 10.0.0.1:20042 >"$RAY_CLUSTER_DIR/ray_current_cluster"
fi
exec sleep 600
""",
    # Both workers are started in the background: it ends after they have been.
    "recipes/any.sh": """
until [[ $(grep -c " worker " "$LOG") == 2 ]]; do sleep 0.05; done
echo "ran with $RAY_ADDRESS: $*" >>"$LOG"
exit "${ENDS_WITH:-0}"
""",
}


def submit(folder, *arguments, **variables):
    """(exit code, what was started, in order)"""
    for name, text in FILES.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/usr/bin/env bash\n{text}\n")
        file.chmod(0o755)
    log = folder / "log"
    environment = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder), "LOG": str(log),
        "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": f"42{os.getpid()}", "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_CPUS_PER_NODE": "32(x3)", **variables,
    }  # fmt: skip
    process = subprocess.run(["bash", SBATCH, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    return process.returncode, log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(
    ("cpus_per_node", "expected"),
    [("32(x3)", 32), ("128", 128), ("128(x2),96", 96), ("8,128(x2)", 8)],
    ids=["alike", "one node", "the last smaller", "the first smaller"],
)
def test_every_step_has_its_nodes_cpus_and_is_bound_to_none(tmp_path, cpus_per_node, expected):
    code, started = submit(tmp_path, "recipes/any.sh", "num_steps=3", SLURM_JOB_CPUS_PER_NODE=cpus_per_node)
    assert code == 0
    steps = [line.split(" | ") for line in started if " | " in line]
    assert len(steps) == 4  # the head, two workers, the run
    for options, _ in steps:
        assert f"--overlap --nodes=1 --ntasks=1 --cpus-per-task={expected} --cpu-bind=none --nodelist=n" in options
    [run] = [options for options, command in steps if "any.sh" in command]
    assert run.endswith("--nodelist=n1")
    assert {options[-2:] for options, command in steps if " worker 10.0.0.1:20042" in command} == {"n2", "n3"}


def test_the_run_begins_after_set_up_and_head_and_its_exit_code_is_the_jobs(tmp_path):
    code, started = submit(tmp_path, "recipes/any.sh", "a=1", "b=2", ENDS_WITH="7")
    assert code == 7
    assert started[0] == "setup" and " head --port " in started[1]
    assert started[-1] == "ran with 10.0.0.1:20042: a=1 b=2"


def test_without_a_recipe_it_says_how(tmp_path):
    assert submit(tmp_path) == (2, [])
