"""Whole runs with the teacher behind HTTP: the same losses as with the teacher in the run, whatever dies meanwhile."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from tests.teacher_servers import ROOT, TOKEN, make_models, teacher_server

NUM_STEPS = 5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    make_models(root)
    rows = [
        {"prompt": f"{a}+{b}=", "answer": str(a + b), "data_source": "odd" if a % 2 else "even"}
        for a in range(9)
        for b in range(9)
    ]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def start_run(pair, output_dir, backend, *overrides) -> subprocess.Popen:
    settings = {
        "student.path": pair / "student",
        "data.train_path": pair / "prompts.jsonl",
        "data.eval_path": pair / "prompts.jsonl",
        "data.grader": "final_hash",
        "output_dir": output_dir,
        "num_steps": NUM_STEPS,
        "data.prompts_per_step": 12,
        "rollout.backend": backend,
        "rollout.max_num_seqs": 6,
        "rollout.max_response_tokens": 12,
        "rollout.num_candidates": 8,
        "teacher.top_k": 8,
        "learner.learning_rate": 1e-3,
        "learner.micro_batch_tokens": 64,
        "eval.num_problems": 4,
        "eval.num_kl_prompts": 8,
        "log.wandb": "off",
        "log.dashboard": "false",
    }
    command = [sys.executable, "-m", "opsd.train", *(f"{name}={value}" for name, value in settings.items()), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OPSD_TEACHER_TOKEN": TOKEN}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)  # fmt: skip


def training_lines(output_dir):
    file = output_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if "loss" in line]


def finished(process, output_dir):
    """(the training lines without what depends on the clock, the summary's figures, what was printed)."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]
    lines = [
        {name: value for name, value in line.items() if not name.startswith(("phase_s", "tokens_per_s", "queue"))}
        for line in training_lines(output_dir)
    ]
    summary = json.loads((output_dir / "summary.json").read_text())
    return lines, {name: summary[name] for name in ("reverse_kl_after", "teacher_accuracy", "tokens_scored")}, output


@pytest.mark.parametrize("backend", ["transformers", pytest.param("vllm", marks=pytest.mark.long)])
def test_a_run_over_http_loses_a_server_and_nothing_else(pair, tmp_path, backend):
    """In process with two engines; then with two servers, one of which is killed after the second step."""
    local = [f"teacher.backend={backend}", f"teacher.path={pair / 'teacher'}", "teacher.num_workers=2"]
    wanted = finished(start_run(pair, tmp_path / "local", backend, *local), tmp_path / "local")
    with ExitStack() as stack:
        servers = [
            stack.enter_context(teacher_server(pair / "teacher", token=TOKEN, backend=backend)) for _ in range(2)
        ]
        urls = ",".join(server.url for server in servers)
        run = start_run(pair, tmp_path / "http", backend, "teacher.backend=http", f"teacher.urls=[{urls}]")
        while len(training_lines(tmp_path / "http")) < 2 and run.poll() is None:
            time.sleep(0.01)
        servers[0].end()
        lines, figures, output = finished(run, tmp_path / "http")
    assert f"teacher server {servers[0].url}: " in output
    assert [line["dropped"] for line in lines] == [0] * NUM_STEPS
    assert lines == wanted[0]  # losses, gradients, lengths, shares: bit for bit
    assert figures == wanted[1]


def test_a_run_with_two_teachers_one_of_them_behind_http(pair, tmp_path):
    with teacher_server(pair / "other", token=TOKEN) as server:
        local = [f"teacher.path={pair / 'teacher'}", "teacher.backend=transformers", "num_steps=2"]
        run = start_run(pair, tmp_path / "run", "transformers", *local, f"+teacher.by_source={{odd: '{server.url}'}}")
        lines, figures, _ = finished(run, tmp_path / "run")
        assert len(lines) == 2 and figures["teacher_accuracy"] is not None
