"""scripts/gpu_check.sh on the CPU in an environment with torch and transformers only; and that its checks can fail."""

import json
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import gpu_check
import gpu_exact
import gpu_head
import gpu_table
import gpu_training
import gpu_worker
from gpu_parts import Part, parts
from opsd.learner.attention import mask_where_needed
from tests.bare_environment import make_bare_environment
from tests.opsd.process_group import one_rank

ROOT = Path(__file__).resolve().parents[3]
HEAD = dict(device="cpu", dtype="float32", rows=40, vocab=300, width=32, named=8)


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    return make_bare_environment(tmp_path_factory.mktemp("bare"))


def check(interpreter, out, *arguments):
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(interpreter), "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "scripts" / "gpu_check.sh", "--device", "cpu", "--out", out, *arguments]
    return subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_part_runs_without_vllm_ray_and_hydra(interpreter, tmp_path):
    process = check(interpreter, tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    done = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(done) == [part.name for part in parts("cpu")]
    assert {outcome["status"] for outcome in done.values()} == {"passed", "measured"}
    assert "vllm" not in done["machine"]["result"] and "ray" not in done["machine"]["result"]
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"| {part.name} |" in table for part in parts("cpu") if part.is_check)
    assert "72.0 | 1.00 |" in table and "35.3 | 0.49 |" in table
    assert "Failed or skipped" not in table


def test_what_there_is_no_time_for_is_named_and_the_exit_code_says_so(tmp_path):
    assert gpu_check.main(["--device", "cpu", "--out", str(tmp_path), "--seconds", "0", "--only", "attention"]) == 1
    table = (tmp_path / "gpu.md").read_text()
    assert "- packed attention, bfloat16: no time left" in table


def test_a_gpu_box_without_vllm_or_with_one_gpu_skips_the_engines_by_name(monkeypatch):
    engines = [part for part in parts("cuda") if part.function.startswith("gpu_engines")]
    done = {"machine": {"result": {"num_gpus": 1}}}
    found = [gpu_check.run(None, replace(part, missing=""), done, time.monotonic()) for part in engines]
    assert [outcome["error"] for outcome in found] == ["needs 2 GPUs", "no time left", "needs 2 GPUs"]
    monkeypatch.setattr("gpu_parts.find_spec", lambda name: None)
    engines = [part for part in parts("cuda") if part.function.startswith("gpu_engines")]
    found = [gpu_check.run(None, part, done, time.monotonic()) for part in engines]
    assert {(outcome["error"], outcome["must_hold"]) for outcome in found} == {("vLLM is not installed", False)}


def test_a_box_without_triton_skips_the_candidate_by_name_and_times_torchs_passes(monkeypatch):
    monkeypatch.setattr("gpu_parts.find_spec", lambda name: None)
    found = {
        part.name: gpu_check.run(None, part, {}, time.monotonic())
        for part in parts("cuda")
        if part.function.startswith("gpu_passes")
    }
    without = {name: outcome for name, outcome in found.items() if outcome["error"] == "Triton is not installed"}
    assert len(without) == 8 and all("Triton" in name and not o["must_hold"] for name, o in without.items())
    assert sorted(found.keys() - without.keys()) == ["head's passes, torch, N 1,024", "head's passes, torch, N 4,096"]


@pytest.fixture
def worker():
    worker = gpu_worker.PartsWorker()
    yield worker
    worker.close()


def test_a_part_that_dies_hangs_or_raises_costs_that_part_only(worker):
    def outcome(function, limit_s, **options):
        return worker.run(Part(name="x", function=function, options=options), limit_s)

    assert outcome("os:_exit", 60, status=3)["error"] == "its process ended with exit code 3"
    assert outcome("signal:pause", 0.2)["error"].startswith("not done within")
    raised = outcome("builtins:int", 60, base=3)
    assert raised["status"] == "failed" and raised["error"].startswith("TypeError: int() missing")
    assert outcome("builtins:dict", 60, a=1)["result"] == {"a": 1}


def failing(checks):
    return {check.what for check in checks if not check.passed}


def test_the_head_without_its_temperatures_is_found_wrong(monkeypatch):
    right = gpu_head.sparse_head_loss
    assert not failing(gpu_head.head(**HEAD))
    monkeypatch.setattr(gpu_head, "sparse_head_loss", lambda *a, **k: right(*a, **{**k, "temperature_N": None}))
    wrong = failing(gpu_head.head(**HEAD))
    assert "reverse_kl, its own chunks: value" in wrong and "jsd, three chunks: grad weight" in wrong


@pytest.mark.parametrize("wrong", [{"temperature_N": None}, {"stop_ids": ()}])
def test_the_exact_head_without_its_temperatures_or_merged_stops_is_found_wrong(monkeypatch, wrong):
    size = dict(device="cpu", dtype="float32", rows=40, vocab=300, width=32, teacher_width=48)
    right = gpu_exact.exact_head_loss
    assert all(check.passed for check in gpu_exact.exact_head(**size))
    monkeypatch.setattr(gpu_exact, "exact_head_loss", lambda *a, **k: right(*a, **{**k, **wrong}))
    assert not any(check.passed for check in gpu_exact.exact_head(**size) if check.what.endswith("value"))


def test_logits_that_are_rounded_to_bfloat16_are_found_wrong(monkeypatch):
    right = gpu_head.bucket_logprobs

    def rounded(hidden_ND, weight_VD, *arguments, **options):
        return right(hidden_ND.bfloat16().float(), weight_VD, *arguments, **options)

    monkeypatch.setattr(gpu_head, "bucket_logprobs", rounded)
    assert "log-probabilities, nats" in failing(gpu_head.head_exactness(**HEAD))


def test_attention_that_looks_into_the_next_sequence_is_found_wrong(monkeypatch):
    AttentionInterface.register("leaky", sdpa_attention_forward)
    AttentionMaskInterface.register("leaky", mask_where_needed)
    monkeypatch.setattr(gpu_training, "packed_attention_name", lambda device, dtype: "leaky")
    checks = gpu_training.packed_attention(device="cpu", dtype="bfloat16")
    assert failing(checks) == {"leaky: values", "leaky: gradients"}


def test_a_step_that_does_not_learn_is_found_wrong(monkeypatch):
    monkeypatch.setattr(gpu_training, "build_optimizer", lambda parameters, cfg: torch.optim.SGD(parameters, lr=0.0))
    with one_rank():
        checks = gpu_training.training_step(device="cpu", dtype="float32")
    assert failing(checks) == {"loss after 6 steps, share of the first"}


def test_the_candidates_time_stands_beside_torchs_for_as_many_rows():
    def outcome(rows, block, forward_ms, backward_ms):
        options = {"rows": rows, "vocab": 151_936, "block": block}
        result = {"forward_ms": forward_ms, "backward_ms": backward_ms}
        return {"status": "measured", "must_hold": False, "options": options, "result": result}

    of_parts = [outcome(4096, None, 6.0, 4.0), outcome(4096, 1024, 2.0, 3.0), outcome(1024, 1024, 0.5, 0.5)]
    table = gpu_table.report("cuda", {f"head's passes, {number}": part for number, part in enumerate(of_parts)})
    assert "| torch | 4,096 | 151,936 | 6.00 | 4.00 | 1.00 |" in table
    assert "| Triton, 1,024 columns at a time | 4,096 | 151,936 | 2.00 | 3.00 | 0.50 |" in table
    assert "| Triton, 1,024 columns at a time | 1,024 | 151,936 | 0.50 | 0.50 |  |" in table


def test_a_check_that_fails_is_marked_in_the_table():
    rows = [
        {"what": "near", "error": 0.9, "allowed": 1.0, "passed": True},
        {"what": "beyond", "error": float("nan"), "allowed": 1.0, "passed": False},
    ]
    done = {"head": {"status": "failed", "must_hold": True, "result": rows}}
    assert "| head | **1 of 2** | beyond | nan | 1.0e+00 |" in gpu_table.report("cuda", done)
