"""Token importance in TRL's on-policy distillation trainer: a subclass that replaces its loss and nothing else.

    pip install .[trl]
    python recipes/examples/trl_trainer.py --student STUDENT --teacher TEACHER --prompts PROMPTS.jsonl --output OUT

Two model folders of one tokenizer and one vocabulary size, and prompts, one {"prompt": ...} a line; a pair to try it
with comes from `python scripts/make_pair.py sums PAIR`. TRL samples, batches, steps, logs and saves as ever.

Tested with TRL 1.16.0. It warns of vLLM 0.32, which this project pins: its own `use_vllm` wants an older one, the
sampling with transformers that is used here does not.
"""
# B completions, L prompt and completion tokens, T completion tokens, V vocabulary

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer

from tip.functional import importance_from_selection, token_stats, weighted_distillation_loss
from tip.scores import SCORES
from tip.selectors import SELECTORS


class ImportanceTrainer(DistillationTrainer):
    """DistillationTrainer whose loss is the mean divergence over the most important tokens of each completion.

    `ratio`: the share of them; `score`, `divergence`: names in SCORES and DIVERGENCES. TRL's `beta` does not matter,
    its `temperature` divides both models' logits in the loss. For prompts of text: images and tools are not passed on.
    """

    def __init__(
        self, *args, ratio: float = 0.5, score: str = "soft_or", divergence: str | Callable = "reverse_kl", **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.ratio, self.score, self.divergence = ratio, SCORES[score], divergence

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mask_BT = inputs["completion_mask"].bool()
        student_logits_BTV = completion_logits(model, inputs)
        with torch.no_grad():
            teacher_logits_BTV = completion_logits(self.teacher_model.eval(), inputs)
        loss = weighted_distillation_loss(
            student_logits_BTV,
            teacher_logits_BTV,
            self.importance(student_logits_BTV, teacher_logits_BTV, mask_BT),
            mask_BT=mask_BT,
            temperature=self.temperature,
            divergence=self.divergence,
        )
        if model.training:
            # From the mean over this micro-batch to its part of the mean over the step's; ranks are averaged later.
            num_tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            loss = loss * mask_BT.sum() / num_tokens
        return (loss, None) if return_outputs else loss

    def importance(self, student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, mask_BT: Tensor) -> Tensor:
        """[B, T]: 0 for the tokens that are dropped, mean 1 over those of `mask_BT`."""
        stats = token_stats(student_logits_BTV, teacher_logits_BTV, mask_BT)
        selection = SELECTORS["top_ratio"](self.score(stats), mask_BT.sum(1), ratio=self.ratio)
        return importance_from_selection(selection, mask_BT, normalise=True)


def completion_logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """[B, T, V], row t scoring token t of the completion. Through the model's own forward, as DDP and FSDP need it."""
    ids_BL = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_BL = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    return model(
        input_ids=ids_BL[:, :-1],  # nothing was sampled after the last token
        attention_mask=attention_BL[:, :-1],
        logits_to_keep=inputs["completion_ids"].shape[1],
        use_cache=False,
    ).logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--ratio", type=float, default=0.5)
    args = parser.parse_args()
    trainer = ImportanceTrainer(
        model=args.student,
        teacher_model=args.teacher,
        args=DistillationConfig(
            output_dir=str(args.output),
            per_device_train_batch_size=16,
            max_completion_length=48,
            max_steps=args.steps,
            learning_rate=1e-3,
            warmup_steps=10,
            logging_steps=1,
            bf16=torch.cuda.is_available(),  # TRL's default, which refuses to start on a CPU
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=str(args.prompts), split="train"),
        ratio=args.ratio,
    )
    trainer.train()


if __name__ == "__main__":
    main()
