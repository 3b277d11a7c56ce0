"""An exported checkpoint of two ranks computes what the learner computed, in transformers and in vLLM."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from opsd.batch import held_here, scored_batch
from opsd.cluster.ray import ray_cluster
from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.config.lora import LoraConfig
from opsd.config.run import DataConfig, LearnerConfig, RunConfig, StudentConfig
from opsd.learner.group import LearnerGroup
from opsd.ops.losses.divergences import reverse_kl
from opsd.run_folder import RunFolder
from opsd.teacher.pool import TeacherPool
from opsd.types import Selection, Vocabulary
from tests.opsd.builders import scored_rollouts
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = Vocabulary(size=64, stop_ids=(0,))
LENGTHS = [12, 5, 9, 1]


def trained(base, run, lora):
    """A run's folder with one checkpoint, of two ranks; rollouts; and the learner's log-probabilities of them [T]."""
    cfg = RunConfig(
        output_dir=str(run),
        student=StudentConfig(path=str(base), lora=lora),
        teacher=TeacherConfig(path=str(base)),
        data=DataConfig(train_path="prompts.jsonl", eval_path="prompts.jsonl"),
        learner=LearnerConfig(num_workers=2, learning_rate=0.02, schedule="constant", micro_batch_tokens=16),
    )
    folder = RunFolder(cfg.output_dir)
    folder.claim(cfg)
    scored = held_here(scored_rollouts(LENGTHS, VOCABULARY), VOCABULARY)
    every = Selection(index_N=torch.arange(sum(LENGTHS)), weight_N=torch.ones(sum(LENGTHS)))
    with ray_cluster(dashboard=False):
        learner = LearnerGroup(
            cfg.student, cfg.learner, divergence=reverse_kl, support="teacher", vocabulary=VOCABULARY,
            num_steps=cfg.num_steps, device="cpu",
        )  # fmt: skip
        learner.wait_ready()
        before = learner.token_stats(scored).student_logprob_T
        for _ in range(3):
            learner.train_step(scored, every)
        unfinished = folder.checkpoints.begin(3)
        learner.save(unfinished / "learner", in_background=False)
        sums = learner.saved(wait=True)
        folder.checkpoints.finish(unfinished, {"step": 3}, sums, keep=1)
        after = learner.token_stats(scored).student_logprob_T
    assert (after - before).abs().max() > 0.1, "equal weights would hide an export of the base model"
    return scored, after.numpy()


def transformers_logprobs(model, scored):
    found = []
    for rollout in scored.rollouts:
        prompt, response = rollout.prompt.token_ids, rollout.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids[None]).logits[0], -1)
        found.append(logprobs[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])[:, 0].numpy())
    return np.concatenate(found)


def vllm_logprobs(folder, scored):
    with ray_cluster(dashboard=False):
        cfg = TeacherConfig(path=str(folder), top_k=4)
        pool = TeacherPool(teacher_spec(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=32))
        pool.wait_ready()
        again = scored_batch(pool.begin([dict(enumerate(scored.rollouts))]))
        return again.tokens.teacher_logprob_T.numpy()


@pytest.mark.parametrize(
    ("tied", "lora"),
    [
        pytest.param(True, LoraConfig(), id="tied"),
        pytest.param(False, LoraConfig(), id="untied", marks=pytest.mark.long),
        pytest.param(False, LoraConfig(rank=4, alpha=8.0), id="lora"),
    ],
)
def test_an_exported_model_gives_the_learners_log_probabilities(tied, lora, tmp_path):
    base = make_tiny_qwen3(tmp_path / "base", tied=tied, seed=4, eos_token_id=0, scale=2.0)
    make_char_tokenizer(base, eos_token_id=0)
    scored, expected = trained(base, tmp_path / "run", lora)
    out = tmp_path / "exported"
    command = [sys.executable, ROOT / "scripts" / "export.py", tmp_path / "run", out, "--dtype", "float32"]
    process = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("Warning") == 0
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    np.testing.assert_allclose(transformers_logprobs(model, scored), expected, atol=1e-4, rtol=0)
    assert (out / "adapter").is_dir() == (lora.rank > 0)
    if lora.rank:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter").eval()
        np.testing.assert_allclose(transformers_logprobs(model, scored), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(vllm_logprobs(out, scored), expected, atol=1e-4, rtol=0)
