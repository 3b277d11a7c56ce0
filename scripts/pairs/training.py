"""Trains a tiny pair from nothing: a teacher that can do a task, and a student that is stopped half-way."""
# B texts, T tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pairs.task import EOS, EOS_ID, MAX_TOKENS, PAD_ID, Draw, Problem, build_tokenizer, is_right, one_side, row_of

IGNORED = -100  # label of a position without loss
WARMUP_STEPS = 20
PEAK_LEARNING_RATE = 3e-3

Text = Sequence[tuple[str, bool]]  # its parts in order, and whether the model is to write each itself


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
    texts: Callable[[ModelPlan, int], Iterator[Text]] | None = None  # of a seed; None: every problem with its response
    showing: Callable[[Problem, str], str] | None = None  # the prompt with a solution, which the model can use


Respond = Callable[[Qwen3ForCausalLM, PreTrainedTokenizerFast, Sequence[Any]], list[str]]  # of problems


@dataclass(frozen=True, kw_only=True)
class PairPlan:
    """A task, and the two models for it."""

    draw: Draw
    vocabulary: tuple[str, ...]
    word: str = "."  # the pattern of a token
    template: str = ""  # for conversations
    row: Callable[[Any], dict[str, Any]] = row_of  # of the prompt file
    respond: Respond | None = None  # final turns of greedy trajectories; None: the response to each prompt
    max_response_tokens: int
    teacher: ModelPlan
    student: ModelPlan
    student_between: tuple[float, float]  # its greedy accuracy in a pair that is of use
    teacher_at_least: float = 0.97

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return build_tokenizer(self.vocabulary, self.word, self.template)

    def accuracy(
        self,
        model: Qwen3ForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        problems: Sequence[Problem],
        showing: Callable[[Problem, str], str] | None = None,
    ) -> float:
        """Share of the problems whose greedy response is right; `showing`: to prompts with the solution."""
        if self.respond:
            responses = self.respond(model, tokenizer, problems)
        else:
            prompts = [showing(p, p.response) if showing else p.prompt for p in problems]
            responses = greedy_responses(model, tokenizer, prompts, self.max_response_tokens)
        return sum(map(is_right, responses, problems)) / len(problems)


def train_pair(
    out: Path, plan: PairPlan, seed: int, probe: list[Problem], evaluation: list[Problem]
) -> dict[str, float]:
    """Trains both models at once, a process and a core each; writes out/teacher and out/student.

    Returns greedy accuracies on `evaluation`: "teacher", "student", and of a student that can use a solution
    "student_shown", to prompts with it.
    `probe` decides when the student stops; neither list may share a problem with the training stream.
    """
    # Forked, as this process has imported torch, which takes seconds, and has not computed yet: no threads to lose.
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        jobs = [
            pool.submit(_train_one, plan, model, out / model.name, seed, probe, evaluation)
            for model in (plan.teacher, plan.student)
        ]
        return {name: accuracy for job in jobs for name, accuracy in job.result().items()}


def _train_one(
    pair: PairPlan, plan: ModelPlan, folder: Path, seed: int, probe: list[Problem], evaluation: list[Problem]
) -> dict[str, float]:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()  # of saving a model of 1 MB
    torch.manual_seed(seed)
    tokenizer = pair.tokenizer()
    model = build_model(plan, len(tokenizer))
    train(model, plan, texts_of(pair, plan, seed), tokenizer, partial(pair.accuracy, problems=probe))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    accuracy = {plan.name: pair.accuracy(model, tokenizer, evaluation)}
    if plan.showing:
        accuracy[f"{plan.name}_shown"] = pair.accuracy(model, tokenizer, evaluation, plan.showing)
    return accuracy


def build_model(plan: ModelPlan, vocab_size: int) -> Qwen3ForCausalLM:
    """A Qwen3 with random float32 weights."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=plan.width,
        intermediate_size=plan.width * 5 // 2,
        num_hidden_layers=plan.num_layers,
        num_attention_heads=plan.num_heads,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=plan.tied,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return Qwen3ForCausalLM(config)


def texts_of(pair: PairPlan, plan: ModelPlan, seed: int) -> Iterator[Text]:
    """The endless training stream of one of the models."""
    if plan.texts:
        return plan.texts(plan, seed)
    problems = one_side(pair.draw(f"{plan.name} {seed}"), held_out=False)
    return (worked(problem.prompt, problem.response) for problem in problems)


def worked(prompt: str, response: str) -> Text:
    return (prompt, False), (response + EOS, True)


def train(
    model: Qwen3ForCausalLM,
    plan: ModelPlan,
    texts: Iterator[Text],
    tokenizer: PreTrainedTokenizerFast,
    accuracy: Callable[[Qwen3ForCausalLM, PreTrainedTokenizerFast], float],
) -> None:
    """Supervised steps, until the plan's accuracy (on a probe) or the end of its steps."""
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
            share = accuracy(model, tokenizer)
            bar.set_postfix(accuracy=f"{share:.0%}")
            if share >= plan.stop_at:
                break
    bar.close()


def _warmup_then_cosine(num_steps: int, step: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / num_steps)) / 2


def collate(texts: list[Text], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Of texts: ids [B, T], padded on the right; labels [B, T], at row t token t + 1 where the model is to write it."""
    encoded = [[(token, own) for part, own in text for token in tokenizer.encode(part)] for text in texts]
    longest = max(map(len, encoded)) - 1
    ids_BT = torch.full((len(texts), longest), PAD_ID)
    labels_BT = torch.full((len(texts), longest), IGNORED)
    for row, tokens in enumerate(encoded):
        ids_BT[row, : len(tokens) - 1] = torch.tensor([token for token, _ in tokens[:-1]])
        labels_BT[row, : len(tokens) - 1] = torch.tensor([token if own else IGNORED for token, own in tokens[1:]])
    return ids_BT, labels_BT


@torch.no_grad()
def greedy_responses(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], max_tokens: int
) -> list[str]:
    """What the model writes after each prompt, without special tokens."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    responses = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda place: len(encoded[place]))
    for _, group in groupby(by_length, key=lambda place: len(encoded[place])):  # equal lengths need no padding
        places = list(group)
        ids_BT = torch.tensor([encoded[place] for place in places])
        output_BT = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=max_tokens, do_sample=False
        )
        texts = tokenizer.batch_decode(output_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            responses[place] = text
    return responses
