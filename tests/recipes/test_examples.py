"""The examples for other people's trainers run, and do what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.oracle import dense_divergence
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_plain_pytorch_loop_brings_the_student_to_the_teacher():
    command = [sys.executable, ROOT / "recipes/examples/plain_pytorch.py", "--steps", "30"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"loss (\S+) on kept tokens, reverse KL (\S+) on all", done.stdout)
    assert len(steps) == 30
    for values in zip(*steps, strict=True):
        assert sum(map(float, values[-3:])) < 0.75 * sum(map(float, values[:3]))


@pytest.fixture
def models(tmp_path):
    for name, seed in (("student", 1), ("teacher", 2)):
        folder = make_tiny_qwen3(tmp_path / name, tied=False, seed=seed, eos_token_id=0, scale=2.0)
        make_char_tokenizer(folder, eos_token_id=0)
    return {"model": str(tmp_path / "student"), "teacher_model": str(tmp_path / "teacher")}


def train_two_steps(trainer_class, models, tmp_path, **options):
    """The trainer after two steps of two micro-batches each, with completions of different lengths."""
    from datasets import Dataset
    from trl import DistillationConfig

    settings = DistillationConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_completion_length=30,
        learning_rate=1e-2,
        temperature=1.5,
        beta=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
    )
    prompts = ["1+1=", "12+3=", "7*(2+2)=", "9-", "4=4", "0/5="] * 2
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = trainer_class(**models, args=settings, train_dataset=dataset, **options)
    trainer.train()
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.slow
def test_trl_trainer_that_keeps_every_token_is_trls_own(models, tmp_path):
    trl = pytest.importorskip("trl")
    from recipes.examples.trl_trainer import ImportanceTrainer

    theirs = train_two_steps(trl.DistillationTrainer, models, tmp_path)
    ours = train_two_steps(ImportanceTrainer, models, tmp_path, ratio=1.0)
    assert len(logged(ours, "loss")) == 2
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-4)
    for our, their in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        # Adam's first steps are the sign of the gradient: rounding flips it where the gradient is all but zero.
        assert ((our - their).abs() < 1e-4).float().mean() > 0.99


@pytest.mark.slow
def test_trl_trainer_trains_on_the_tokens_of_the_highest_score(models, tmp_path):
    pytest.importorskip("trl")
    from recipes.examples.trl_trainer import ImportanceTrainer

    trainer = train_two_steps(ImportanceTrainer, models, tmp_path, ratio=0.3, score="divergence")
    trainer.model.eval()  # then compute_loss is the mean over this batch
    inputs = {
        "prompt_ids": torch.tensor([[0, 3, 4], [5, 6, 7]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[8, 9, 10, 11, 12, 13, 14], [15, 16, 17, 0, 0, 0, 0]]),
        "completion_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
    }
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, inputs)
        kept = []
        for row, num_tokens, num_kept in ((0, 7, 2), (1, 4, 1)):
            student, teacher = (last_logits(model, inputs, row) for model in (trainer.model, trainer.teacher_model))
            order = dense_divergence("reverse_kl", student, teacher)[:num_tokens].argsort(descending=True)
            at_temperature = dense_divergence("reverse_kl", student / 1.5, teacher / 1.5)
            kept.append(at_temperature[order[:num_kept]])
    assert loss.item() == pytest.approx(torch.cat(kept).mean().item(), rel=1e-5)


def last_logits(model, inputs, row):
    """The logits [7, V] that score the completion of one row, without its padding on the left."""
    ids = torch.cat([inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()], inputs["completion_ids"][row]])
    return model(input_ids=ids[None]).logits[0, -8:-1]
