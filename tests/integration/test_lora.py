"""A whole run whose student trains a LoRA adapter, what it leaves, and how it goes on."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.integration.runs import NUM_STEPS, TRANSFORMERS, finished, losses, train, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
LORA = ("student.lora.rank=4", "learner.learning_rate=2e-2", "checkpoint.every=3", *TRANSFORMERS)


def test_a_run_trains_an_adapter_merges_it_and_goes_on_with_it(pair, tmp_path):
    run = finished(pair, tmp_path / "run", *LORA)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["reverse_kl_after"] < summary["reverse_kl_before"]
    stored = load_file(run / "student" / "adapter" / "adapter_model.safetensors")
    assert summary["lora"]["parameters_trained"] == sum(tensor.numel() for tensor in stored.values())
    assert "LoRA of rank 4" in (run / "report.html").read_text()
    with safe_open(
        run / "checkpoints" / f"step_{NUM_STEPS:06d}" / "learner" / "rank_0.safetensors", framework="pt"
    ) as file:
        names = list(file.keys())
    assert {name.split(".")[0] for name in names} == {"weight", "step", "exp_avg", "exp_avg_sq", "rng"}
    assert all("lora_" in name for name in names if not name.startswith("rng"))
    base = AutoModelForCausalLM.from_pretrained(pair / "student")
    merged = PeftModel.from_pretrained(base, run / "student" / "adapter").merge_and_unload().state_dict()
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-6)

    ended = shutil.copytree(run, tmp_path / "parts")  # as it was when its third step had been saved
    shutil.rmtree(ended / "checkpoints" / f"step_{NUM_STEPS:06d}")
    refused = train(pair, ended, *LORA, "student.lora.alpha=8", "resume=auto")
    assert refused.returncode == 2
    assert "student.lora.alpha differs from the run in" in refused.stderr
    resumed = finished(pair, ended, *LORA, "resume=auto")
    assert losses(resumed) == losses(run)
    assert all(torch.equal(weights(resumed)[name], weight) for name, weight in weights(run).items())
