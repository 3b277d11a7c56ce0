"""Distils with token importance in a loop of plain PyTorch and transformers: no Ray, no vLLM, no config.

    python recipes/examples/plain_pytorch.py
    python recipes/examples/plain_pytorch.py --student STUDENT --teacher TEACHER --prompts PROMPTS.jsonl --lr 3e-4

Without arguments two tiny Qwen3 models with random weights are made on the spot, and the student learns to speak like
the teacher in half a minute on one core. With them: two model folders of one tokenizer, and prompts, one
{"prompt": ...} a line. A pair to try it with comes from `python scripts/make_pair.py sums PAIR`.
"""
# B rollouts, P prompt tokens with padding on the left, L prompt and response tokens, T = L - 1 rows, V vocabulary

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from tip.functional import importance_from_selection, token_stats, weighted_distillation_loss
from tip.scores import SCORES
from tip.selectors import SELECTORS


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.student is None:
        student, teacher = tiny_model(logit_spread=0.5), tiny_model(logit_spread=2.0)
        prompts = random_prompts(args.batch_size, student.config.vocab_size)
    else:
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (args.student, args.teacher)
        )
        prompts = prompts_of_file(args.prompts, args.student, args.batch_size, args.seed)
    student, teacher = student.to(device), teacher.to(device).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr)
    for step in range(args.steps):
        ids_BP, attention_BP = (tensor.to(device) for tensor in next(prompts))
        ids_BL, attention_BL, response_BL = sample(student, ids_BP, attention_BP, args.max_new_tokens)
        loss, reverse_kl = train_step(student, teacher, optimizer, ids_BL, attention_BL, response_BL, args.ratio)
        print(f"step {step}: loss {loss:.4f} on kept tokens, reverse KL {reverse_kl:.4f} on all, nats", flush=True)


def train_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    ids_BL: Tensor,
    attention_BL: Tensor,
    response_BL: Tensor,
    ratio: float,
) -> tuple[float, float]:
    """One update on the `ratio` most important response tokens: (mean loss over them, mean reverse KL over all)."""
    # The last token predicts nothing that was sampled: without it, row t scores token t + 1 and no logits are sliced.
    inputs = {"input_ids": ids_BL[:, :-1], "attention_mask": attention_BL[:, :-1], "use_cache": False}
    mask_BT = response_BL[:, 1:]
    student_logits_BTV = student(**inputs).logits
    with torch.no_grad():
        teacher_logits_BTV = teacher(**inputs).logits

    stats = token_stats(student_logits_BTV, teacher_logits_BTV, mask_BT)
    selection = SELECTORS["top_ratio"](SCORES["soft_or"](stats), mask_BT.sum(1), ratio=ratio)
    importance_BT = importance_from_selection(selection, mask_BT, normalise=True)
    loss = weighted_distillation_loss(
        student_logits_BTV, teacher_logits_BTV, importance_BT, mask_BT=mask_BT, divergence="reverse_kl"
    )
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return loss.item(), stats.reverse_kl_T.mean().item()


@torch.no_grad()
def sample(
    student: PreTrainedModel, ids_BP: Tensor, attention_BP: Tensor, max_new_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The student's answers at temperature 1: (token ids, attention mask, which tokens are response), each [B, L].

    A response ends with its first end-of-sequence token, which belongs to it.
    """
    end_id = student.generation_config.eos_token_id
    ids_BL = student.generate(
        ids_BP,
        attention_mask=attention_BP,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=int(torch.tensor(end_id).flatten()[0]),  # what follows an end is masked, whatever it is
    )
    num_prompt_tokens = ids_BP.shape[1]
    is_end_BR = torch.isin(ids_BL[:, num_prompt_tokens:], torch.tensor(end_id, device=ids_BL.device))
    ends_before_BR = is_end_BR.cumsum(1) - is_end_BR.long()
    response_BL = torch.cat([torch.zeros_like(ids_BP, dtype=torch.bool), ends_before_BR == 0], dim=1)
    attention_BL = torch.cat([attention_BP, response_BL[:, num_prompt_tokens:].long()], dim=1)
    return ids_BL, attention_BL, response_BL


def tiny_model(logit_spread: float, vocab_size: int = 64, width: int = 64) -> PreTrainedModel:
    """A random Qwen3 whose logits have about this standard deviation: the higher, the more it has to teach."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=logit_spread / width**0.5)
    return model


def random_prompts(batch_size: int, vocab_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (token ids, attention mask), [B, 4] each; token 0 ends a sequence, so no prompt has it."""
    while True:
        ids_BP = torch.randint(1, vocab_size, (batch_size, 4))
        yield ids_BP, torch.ones_like(ids_BP)


def prompts_of_file(path: Path, tokenizer_folder: Path, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random batches of the file's prompts, tokenised and padded on the left: (token ids, attention mask)."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    generator = random.Random(seed)
    while True:
        batch = tokenizer(generator.choices(texts, k=batch_size), padding=True, return_tensors="pt")
        yield batch["input_ids"], batch["attention_mask"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--ratio", type=float, default=0.5, help="share of each response's tokens that is trained on")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if len({args.student is None, args.teacher is None, args.prompts is None}) > 1:
        parser.error("--student, --teacher and --prompts belong together: give all or none")
    return args


if __name__ == "__main__":
    main()
