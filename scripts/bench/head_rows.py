"""Rows to measure the output head on: random ones, and those of a student on its own answers."""
# N rows, D width, V vocabulary, K the teacher's top tokens

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

LEAST_REST = 1e-6  # of the teacher's probability outside its top K: below it, 1 - sum is rounding


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the head and the sparse loss take."""

    hidden_ND: Tensor
    weight_VD: Tensor
    support_NK: Tensor  # int64
    teacher_logprobs_NB: Tensor  # [N, K + 1], float32: the top K and the rest

    def first(self, num_rows: int) -> Rows:
        return Rows(
            hidden_ND=self.hidden_ND[:num_rows],
            weight_VD=self.weight_VD,
            support_NK=self.support_NK[:num_rows],
            teacher_logprobs_NB=self.teacher_logprobs_NB[:num_rows],
        )

    def to(self, device: str, dtype: torch.dtype) -> Rows:
        return Rows(
            hidden_ND=self.hidden_ND.to(device, dtype),
            weight_VD=self.weight_VD.to(device, dtype),
            support_NK=self.support_NK.to(device),
            teacher_logprobs_NB=self.teacher_logprobs_NB.to(device),
        )


def random_rows(num_rows: int, vocab: int, width: int, top_k: int) -> Rows:
    """Unit hidden rows and weights of 1 / sqrt(D): logits of variance 1, so no token of the student's is likely."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(num_rows, width, generator=generator)
    weight_VD = torch.randn(vocab, width, generator=generator).mul_(width**-0.5)
    # Not torch.randperm: its buffers, one per row, fray the heap by gigabytes, and a peak would hide in there.
    draw = random.Random(0)
    support_NK = torch.tensor([draw.sample(range(vocab), top_k) for _ in range(num_rows)])
    teacher_logprobs_NB = torch.randn(num_rows, top_k + 1, generator=generator).mul_(2.0).log_softmax(1)
    return Rows(
        hidden_ND=hidden_ND, weight_VD=weight_VD, support_NK=support_NK, teacher_logprobs_NB=teacher_logprobs_NB
    )


@torch.no_grad()
def sampled_rows(student_path: Path, teacher_path: Path, prompts: Path, num_rows: int, top_k: int, tokens: int) -> Rows:
    """The first `num_rows` tokens that the student samples (temperature 1) in answers of at most `tokens` tokens.

    `prompts`: JSON lines with a "question" or a "prompt". Both models must share one vocabulary.
    Raises ValueError where the prompts give fewer tokens.
    """
    tokenizer = AutoTokenizer.from_pretrained(student_path, local_files_only=True)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
        for path in (student_path, teacher_path)
    )
    hidden, support, logprobs, found = [], [], [], 0
    for number, batch in enumerate(batches(prompts, 16)):
        if found >= num_rows:
            break
        torch.manual_seed(number)
        for prompt, answer in answers(student, tokenizer, batch, tokens):
            ids = torch.cat([prompt, answer])[None]
            rows = slice(len(prompt) - 1, -1)
            hidden.append(student.base_model(ids).last_hidden_state[0, rows])
            top = teacher(ids).logits[0, rows].log_softmax(1).topk(top_k, dim=1)
            rest_N1 = (1.0 - top.values.exp().sum(1, keepdim=True)).clamp_min(LEAST_REST).log()
            support.append(top.indices)
            logprobs.append(torch.cat([top.values, rest_N1], dim=1))
            found += len(answer)
    if found < num_rows:
        raise ValueError(f"{prompts}: {found} answer tokens, {num_rows} wanted: give more prompts or a higher --tokens")
    return Rows(
        hidden_ND=torch.cat(hidden),
        weight_VD=student.get_output_embeddings().weight.detach().clone(),
        support_NK=torch.cat(support),
        teacher_logprobs_NB=torch.cat(logprobs),
    ).first(num_rows)


def batches(prompts: Path, size: int) -> list[list[str]]:
    records = [json.loads(line) for line in prompts.read_text().splitlines()]
    questions = [record.get("question") or record["prompt"] for record in records]
    return [questions[first : first + size] for first in range(0, len(questions), size)]


def answers(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str], tokens: int
) -> list[tuple[Tensor, Tensor]]:
    """(prompt ids, answer ids up to its stop token) of each question."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in questions
    ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    output = student.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
    pairs = []
    width = inputs.input_ids.shape[1]
    for mask, row in zip(inputs.attention_mask.bool(), output, strict=True):
        stops = (row[width:] == tokenizer.eos_token_id).nonzero()[:, 0].tolist()
        end = width + (stops[0] + 1 if stops else len(row) - width)
        pairs.append((row[:width][mask], row[width:end]))
    return pairs
