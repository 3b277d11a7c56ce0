"""Trains the quick start's two models from nothing: a teacher that can add, a student that is stopped half-way.

COPYING_STUDENT also learns to copy a solution that it is shown, so that it can be its own teacher (`method=opsd`). Its
texts for that hold random sums: true ones it would soon rather compute than copy, and then a solution is of no use.
"""
# B texts, T tokens, V vocabulary

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from sum_task import (
    EOS,
    MAX_RESPONSE_TOKENS,
    PAD,
    VOCABULARY,
    Problem,
    build_tokenizer,
    draw_problems,
    is_right,
    random_response,
)

PAD_ID, EOS_ID = VOCABULARY.index(PAD), VOCABULARY.index(EOS)
IGNORED = -100  # label of a position without loss
WARMUP_STEPS = 20
PEAK_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class ModelPlan:
    """One of the two models. Head dimension 32 is the smallest that vLLM's CPU attention takes."""

    name: str
    num_layers: int
    width: int
    num_heads: int
    tied: bool  # the two models differ here, so that a run exercises both kinds
    stop_at: float | None  # probe accuracy that ends the training early; None: all num_steps
    num_steps: int = 350
    batch_texts: int = 64
    probe_every: int = 10  # steps
    shown_share: float = 0.0  # of the texts teach to copy; at a half, some seeds learn to add sooner


TEACHER = ModelPlan("teacher", num_layers=3, width=96, num_heads=4, tied=False, stop_at=None)
STUDENT = ModelPlan("student", num_layers=2, width=64, num_heads=2, tied=True, stop_at=0.2)
COPYING_STUDENT = replace(STUDENT, num_steps=1100, batch_texts=32, probe_every=20, shown_share=2 / 3)


def train_pair(
    out: Path, seed: int, probe: list[Problem], evaluation: list[Problem], *, copies: bool
) -> dict[str, float]:
    """Trains both models at once, a process and a core each; writes out/teacher and out/student.

    Returns greedy accuracies on `evaluation`: "teacher", "student", and where the student `copies` "student_shown", to
    prompts with the solution.
    `probe` decides when the student stops; neither list may share a problem with the training stream.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the two processes
    plans = (TEACHER, COPYING_STUDENT if copies else STUDENT)
    with ProcessPoolExecutor(len(plans), mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_train_one, plan, out / plan.name, seed, probe, evaluation) for plan in plans]
        return {name: accuracy for job in jobs for name, accuracy in job.result().items()}


def _train_one(
    plan: ModelPlan, folder: Path, seed: int, probe: list[Problem], evaluation: list[Problem]
) -> dict[str, float]:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # of saving a model of 1 MB
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(plan)
    train(model, plan, draw_texts(plan, seed), tokenizer, probe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    accuracy = {plan.name: greedy_accuracy(model, tokenizer, evaluation)}
    if plan.shown_share > 0:
        accuracy[f"{plan.name}_shown"] = greedy_accuracy(model, tokenizer, evaluation, shown=True)
    return accuracy


def build_model(plan: ModelPlan) -> Qwen3ForCausalLM:
    """A Qwen3 with random float32 weights and the task's vocabulary."""
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=plan.width,
        intermediate_size=plan.width * 5 // 2,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=plan.num_heads,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=plan.tied,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return Qwen3ForCausalLM(config)


def draw_texts(plan: ModelPlan, seed: int) -> Iterator[tuple[str, str]]:
    """(prompt, response) of the plan's endless training stream: problems solved, and random answers copied."""
    rng = random.Random(f"shown {plan.name} {seed}")
    for problem in draw_problems(f"{plan.name} {seed}", held_out=False):
        if rng.random() < plan.shown_share:
            answer = random_response(problem, rng)
            yield problem.prompt_showing(answer), answer
        else:
            yield problem.prompt, problem.response


def train(model, plan: ModelPlan, texts: Iterator[tuple[str, str]], tokenizer, probe: list[Problem]) -> None:
    """Supervised steps on the worked answers, until the plan's accuracy on `probe` or the end of its steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_warmup_then_cosine, plan.num_steps))
    bar = tqdm(
        range(1, plan.num_steps + 1), desc=plan.name, position=int(plan.name == "student"), leave=False, disable=None
    )
    for step in bar:
        ids_BT, labels_BT = collate(list(islice(texts, plan.batch_texts)), tokenizer)
        logits_BTV = model(ids_BT, use_cache=False).logits
        loss = cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if plan.stop_at is not None and step % plan.probe_every == 0:
            accuracy = greedy_accuracy(model, tokenizer, probe)
            bar.set_postfix(accuracy=f"{accuracy:.0%}")
            if accuracy >= plan.stop_at:
                break
    bar.close()


def _warmup_then_cosine(num_steps: int, step: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / num_steps)) / 2


def collate(texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Of (prompt, response): ids [B, T], padded on the right; labels [B, T], at row t token t + 1 of a response."""
    encoded = [tokenizer.encode(prompt + response) + [EOS_ID] for prompt, response in texts]
    longest = max(map(len, encoded)) - 1
    ids_BT = torch.full((len(texts), longest), PAD_ID)
    labels_BT = torch.full((len(texts), longest), IGNORED)
    for row, ((prompt, _), ids) in enumerate(zip(texts, encoded, strict=True)):
        first = len(prompt) - 1  # the row that predicts the response's first token; one token a character
        ids_BT[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels_BT[row, first : len(ids) - 1] = torch.tensor(ids[first + 1 :])
    return ids_BT, labels_BT


@torch.no_grad()
def greedy_accuracy(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], *, shown: bool = False
) -> float:
    """Share of the problems whose greedy response ends with the right sum; `shown`: to a prompt with the solution."""
    prompts = {p: p.prompt_showing(p.response) if shown else p.prompt for p in problems}
    num_right = 0
    by_length = sorted(problems, key=lambda problem: len(prompts[problem]))
    for _, group in groupby(by_length, key=lambda problem: len(prompts[problem])):  # equal lengths need no padding
        same_length = list(group)
        ids_BT = torch.tensor([tokenizer.encode(prompts[problem]) for problem in same_length])
        output_BT = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=MAX_RESPONSE_TOKENS, do_sample=False
        )
        responses = tokenizer.batch_decode(output_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
        num_right += sum(is_right(text, problem) for text, problem in zip(responses, same_length, strict=True))
    return num_right / len(problems)
