"""A run watched from outside: Ray's metrics endpoint, the Grafana dashboard's names, and a real Prometheus."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "opsd.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
PROMETHEUS = shutil.which("prometheus")


def eventually(attempt, what, process, timeout_s=240):
    """The first true value of attempt(); fails where `process` ends before, or `timeout_s` pass."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended while waiting for {what}"
        if found := attempt():
            return found
        time.sleep(0.5)
    pytest.fail(f"{what}: not within {timeout_s} s")


def fetch(url):
    """The body, or "" while nobody answers there."""
    try:
        with urlopen(url, timeout=10) as answer:
            return answer.read().decode()
    except (URLError, ConnectionError):
        return ""


def end(process):
    """A process that does not heed the request is killed with its group."""
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run that continues until the tests are done: (process, its folder, its metrics' URL, Ray's folder)."""
    root = tmp_path_factory.mktemp("watched")
    for name, layers, seed in (("teacher", 2, 1), ("student", 1, 2)):
        make_tiny_qwen3(root / name, tied=True, layers=layers, seed=seed, eos_token_id=0, scale=2.0)
        make_char_tokenizer(root / name, eos_token_id=0)
    rows = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a in range(10) for b in range(10)]
    (root / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    settings = {
        "student.path": root / "student", "teacher.path": root / "teacher", "output_dir": root / "watched-run",
        "data.train_path": root / "prompts.jsonl", "data.eval_path": root / "prompts.jsonl",
        "data.grader": "final_hash", "data.prompts_per_step": 8, "num_steps": 100_000,
        "rollout.backend": "transformers", "teacher.backend": "transformers",
        "rollout.max_response_tokens": 12, "rollout.num_candidates": 8, "teacher.top_k": 8,
        "eval.num_problems": 8, "eval.num_kl_prompts": 8, "eval.every": 0, "log.wandb": "off",
    }  # fmt: skip
    temporary = tempfile.mkdtemp(prefix="ray")  # short: it is part of the names of sockets
    command = [sys.executable, "-m", "tip.train", *(f"{name}={value}" for name, value in settings.items())]
    often = {"RAY_metrics_report_interval_ms": "2000"}  # Ray's own ten seconds are for clusters
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": temporary, **often}
    said = root / "stderr"
    with said.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=stderr, start_new_session=True)
    try:
        url = eventually(lambda: re.search(r"^metrics (\S+)", said.read_text(), re.M), "the metrics' URL", process)[1]
        yield process, root / "watched-run", url, Path(temporary) / "ray"
    finally:
        end(process)
        print(said.read_text()[-3000:])
        shutil.rmtree(temporary, ignore_errors=True)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_metric_of_the_dashboard_is_exported_with_the_run_s_name(watched):
    process, folder, url, _ = watched
    wanted = {name for expression in EXPRESSIONS for name in re.findall(r"\bray_\w+", expression)}
    assert len(wanted) > 20

    missing = set(wanted)

    def none_missing():
        missing.difference_update(re.findall(r"^(ray_\w+)[{ ]", fetch(url), re.M))
        return not missing

    eventually(none_missing, missing, process)
    [kept] = re.findall(r'^ray_opsd_kept_ratio\{.*run="watched-run".*\} (\S+)$', fetch(url), re.M)
    ratios = [line["kept_ratio"] for line in lines_of(folder) if "loss" in line]
    assert any(float(kept) == pytest.approx(ratio, rel=1e-6) for ratio in ratios)
    for phase in ("rollout", "score", "select", "learn", "sync", "evaluate"):
        assert re.search(rf'^ray_opsd_phase_seconds\{{.*phase="{phase}"', fetch(url), re.M)


@pytest.fixture
def prometheus(watched, tmp_path):
    """Prometheus' URL, with docker/prometheus.yml but for the folder of Ray that it looks into."""
    if PROMETHEUS is None:
        pytest.skip("prometheus is not on the PATH (on Debian: apt install prometheus)")
    *_, ray_folder = watched
    shipped = (ROOT / "docker" / "prometheus.yml").read_text()
    config = shipped.replace("[/tmp/ray/", f"[{ray_folder}/")
    assert config != shipped
    (tmp_path / "prometheus.yml").write_text(config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [PROMETHEUS, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=log, start_new_session=True)
    try:
        eventually(lambda: fetch(f"http://{address}/-/ready"), "Prometheus", process)
        yield f"http://{address}"
    finally:
        end(process)
        print((tmp_path / "log").read_text()[-2000:])


@pytest.mark.slow
def test_prometheus_finds_the_run_and_answers_every_query_of_the_dashboard(watched, prometheus):
    process, folder, *_ = watched

    def series(expression):
        found = json.loads(fetch(f"{prometheus}/api/v1/query?{urlencode({'query': expression})}"))
        return found["data"]["result"]

    [kept] = eventually(lambda: series('ray_opsd_kept_ratio{run="watched-run"}'), "the kept ratio", process)
    assert float(kept["value"][1]) == pytest.approx(0.5, abs=0.1)
    silent = [expression for expression in EXPRESSIONS if not series(expression.replace("$run", ".*"))]
    assert not silent


def test_promtool_accepts_the_configuration():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not on the PATH (on Debian: apt install prometheus)")
    process = subprocess.run([promtool, "check", "config", ROOT / "docker" / "prometheus.yml"], capture_output=True)
    assert process.returncode == 0, process.stdout
