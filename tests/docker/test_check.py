"""docker/check.sh without a container engine: it passes here, and names what is wrong where something is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def check(root, *arguments):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", root / "docker" / "check.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    """The files that the check looks at, to break one of them."""
    for name in ("docker", "requirements", "scripts", "recipes", ".dockerignore"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def test_it_passes_and_says_what_it_did_not_check():
    process = check(ROOT)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "not checked: docker/Dockerfile: that it builds and runs" in process.stdout
    assert "not checked: docker/Dockerfile.cpu: that its steps succeed" in process.stdout


@pytest.mark.parametrize(
    ("file", "good", "bad", "said"),
    [
        ("docker/Dockerfile.cpu", "RUN scripts/setup.sh", "RUN scripts/set-up.sh", "runs scripts/set-up.sh"),
        ("docker/Dockerfile.cpu", "COPY . .", "COPY outputs .", "copies outputs, which .dockerignore leaves out"),
        ("docker/Dockerfile.cpu", "COPY . .", "COPY nowhere .", "line 14: copies nowhere, which does not exist"),
        ("docker/Dockerfile", "WORKDIR /opsd", "WORKDIIR /opsd", "docker/Dockerfile:11:1 unexpected 'W'"),
        ("docker/Dockerfile", ":13.0.3-devel-ubuntu24.04", ":latest", "Dockerfile:5"),
        ("docker/compose.yaml", "./prometheus.yml:", "./prom.yml:", "prometheus mounts ./prom.yml"),
        ("docker/compose.yaml", "docker/Dockerfile.cpu", "Dockerfile.cpu", "trainer-cpu is built from Dockerfile.cpu"),
        (
            "docker/compose.yaml",
            "grafana/grafana:12.2.0",
            "grafana/grafana",
            "grafana has image grafana/grafana, which has no",
        ),
        ("docker/compose.yaml", "restart:", "restrat:", "prometheus has a field restrat"),
        ("docker/compose.yaml", "[prometheus]", "[promtheus]", "grafana depends on promtheus"),
        ("requirements/gpu.txt", "vllm==0.32.0", "vllm>=0.32.0", "vllm>=0.32.0 is not pinned"),
    ],
)
def test_a_fault_is_named(copy, file, good, bad, said):
    text = (copy / file).read_text()
    assert good in text
    (copy / file).write_text(text.replace(good, bad))
    process = check(copy)
    assert process.returncode != 0
    assert said in process.stdout + process.stderr


def test_a_root_that_exists_is_refused(tmp_path):
    process = check(ROOT, "--root", tmp_path)
    assert process.returncode == 2
    assert f"{tmp_path} exists already" in process.stderr or "must run as root" in process.stderr
