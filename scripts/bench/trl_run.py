"""TRL's side of against_trl.py, in a process of its own: python trl_run.py JOB.json, as that program writes it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class StepEnds(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, *_, **__) -> None:
        self.at.append(time.perf_counter())


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(job["seed"])
    output, ends = Path(job["output"]), StepEnds()
    texts = [json.loads(line)[job["prompt_key"]] for line in Path(job["prompts"]).read_text().splitlines()]
    prompts = [[{"role": "user", "content": text}] for text in texts] if job["chat_template"] else texts
    trainer = DistillationTrainer(
        model=job["student"],
        teacher_model=job["teacher"],
        args=DistillationConfig(
            output_dir=str(output),
            per_device_train_batch_size=job["batch"],
            max_completion_length=job["max_tokens"],
            max_steps=job["steps"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=10,
            weight_decay=0.0,
            seed=job["seed"],
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[ends],
    )
    trainer.train()
    trainer.save_model(str(output / "student"))
    AutoTokenizer.from_pretrained(job["student"]).save_pretrained(output / "student")
    (output / "ends.json").write_text(json.dumps(ends.at))


if __name__ == "__main__":
    main()
