"""What bench_support.py compares with: answers of the student, and both models' dense distributions on them."""
# T response tokens of all rollouts, V vocabulary, D width

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from opsd.config.run import RunConfig
from opsd.engines.groups import in_order
from opsd.engines.pool import request_seed
from opsd.engines.sampling import Sampling
from opsd.engines.transformers import TransformersEngine
from opsd.ops.align import predicting_rows
from opsd.ops.losses.divergences import forward_kl, reverse_kl
from opsd.preflight import Setup
from opsd.teacher.sources import DEFAULT
from opsd.types import Rollout, ScoredRollout, TokenStats, Vocabulary


class Dense(NamedTuple):
    """The truth on all response tokens."""

    hidden_TD: Tensor  # float32, the student's
    weight_VD: Tensor  # float32, the student's head
    stats: TokenStats
    grad_hidden_TD: Tensor  # of the mean reverse KL
    grad_weight_VD: Tensor
    teacher_logprobs: list[Tensor]  # float32 [T, V] of each rollout


def make_scored(cfg: RunConfig, setup: Setup, num_rollouts: int) -> list[ScoredRollout]:
    """Answers of the student with the teacher's scores; each side names as many tokens as any row of a table wants."""
    num_tokens, num_candidates = cfg.rollout.max_response_tokens, cfg.rollout.num_candidates
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=num_tokens, num_candidates=num_candidates)
    prompts = setup.train_prompts[:num_rollouts]
    student = TransformersEngine(setup.student)
    requests = [(prompt, 0, request_seed(cfg.seed, 0, prompt.index, 0)) for prompt in prompts]
    rollouts = in_order(student.generate(requests, sampling, policy_version=0))
    scoring = dataclasses.replace(cfg.teacher, backend="transformers", max_batch_tokens=1024)
    spec = dataclasses.replace(setup.teachers[DEFAULT], config=scoring, returns_hidden=True)
    teacher = TransformersEngine(spec)
    scores = teacher.score(rollouts, cfg.teacher.top_k)
    return [ScoredRollout(rollout=r, scores=s) for r, s in zip(rollouts, scores, strict=True)]


def known(item: ScoredRollout, top_k: int, num_candidates: int, *, candidates_scored: bool = True) -> ScoredRollout:
    """`item` as engines with these settings would have returned it."""
    rollout = dataclasses.replace(
        item.rollout,
        candidate_ids=item.rollout.candidate_ids[:, :num_candidates],
        candidate_logprobs=item.rollout.candidate_logprobs[:, :num_candidates],
    )
    scores = dataclasses.replace(
        item.scores,
        top_ids=item.scores.top_ids[:, :top_k],
        top_logprobs=item.scores.top_logprobs[:, :top_k],
        candidate_logprobs=item.scores.candidate_logprobs[:, :num_candidates] if candidates_scored else None,
    )
    return ScoredRollout(rollout=rollout, scores=scores)


def redrawn(
    scored: list[ScoredRollout], dense: Dense, vocabulary: Vocabulary, num_draws: int
) -> list[list[ScoredRollout]]:
    """The same rows, `num_draws` times, each with a token that the student draws there in place of the one it wrote.

    The contexts stay, so a draw's "answer" is no text: it is what may have come at each place.
    """
    generator = torch.Generator(dense.hidden_TD.device).manual_seed(0)
    lengths = [len(item.rollout) for item in scored]
    draws: list[list[ScoredRollout]] = [[] for _ in range(num_draws)]
    for item, hidden_TD, teacher_TV in zip(scored, dense.hidden_TD.split(lengths), dense.teacher_logprobs, strict=True):
        student_TV = events(hidden_TD.double() @ dense.weight_VD[: vocabulary.size].double().T, vocabulary)
        drawn_TM = torch.multinomial(student_TV.exp(), num_draws, replacement=True, generator=generator)
        known_TM = teacher_TV.gather(1, drawn_TM).cpu().numpy()
        for number, items in enumerate(draws):
            rollout = dataclasses.replace(item.rollout, response_ids=drawn_TM[:, number].cpu().numpy().astype(np.int32))
            scores = dataclasses.replace(item.scores, sampled_logprobs=known_TM[:, number])
            items.append(ScoredRollout(rollout=rollout, scores=scores))
    return draws


def dense_truth(cfg: RunConfig, rollouts: list[Rollout], vocabulary: Vocabulary, device: str) -> Dense:
    """Both models over whole answers, one rollout at a time; logits and softmax in float64."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
        for path in (cfg.student.path, cfg.teacher.path)
    )
    weight_VD = student.get_output_embeddings().weight.detach()
    head_VD = weight_VD[: vocabulary.size].double().requires_grad_()
    hidden, hidden_grads, stats, teacher_logprobs = [], [], [], []
    for rollout in rollouts:
        own_TD = response_hidden(student, rollout)
        teacher_head_VD = teacher.get_output_embeddings().weight[: vocabulary.size]
        teacher_TV = events((response_hidden(teacher, rollout) @ teacher_head_VD.T).detach().double(), vocabulary)
        leaf_TD = own_TD.double().requires_grad_()
        student_TV = events(leaf_TD @ head_VD.T, vocabulary)
        value_T = reverse_kl(student_TV, teacher_TV)
        value_T.sum().backward()
        hidden.append(own_TD)
        teacher_logprobs.append(teacher_TV.float())
        hidden_grads.append(leaf_TD.grad)
        student_TV = student_TV.detach()
        stats.append(
            TokenStats(
                entropy_T=torch.special.entr(student_TV.exp()).sum(1) / math.log(vocabulary.size),
                reverse_kl_T=value_T.detach(),
                forward_kl_T=forward_kl(student_TV, teacher_TV),
            )
        )
    hidden_TD = torch.cat(hidden)
    grad_weight_VD = torch.nn.functional.pad(head_VD.grad, (0, 0, 0, len(weight_VD) - vocabulary.size))
    return Dense(
        hidden_TD,
        weight_VD,
        TokenStats.concatenate(stats).to("cpu"),
        torch.cat(hidden_grads) / len(hidden_TD),
        grad_weight_VD / len(hidden_TD),
        teacher_logprobs,
    )


@torch.no_grad()
def response_hidden(model, rollout: Rollout) -> Tensor:
    """float32 [T, D]: the last hidden states that predict the response."""
    sequence = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids]).astype(np.int64))
    hidden_LD = model.base_model(input_ids=sequence[None].to(model.device), use_cache=False).last_hidden_state[0]
    return hidden_LD[predicting_rows(len(rollout.prompt.token_ids), np.arange(len(rollout)))]


def events(logits_TV: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Log-probabilities with the mass of all stop ids at the stop event, differentiable."""
    stop_ids = torch.tensor(vocabulary.stop_ids, device=logits_TV.device)
    merged_T1 = logits_TV[:, stop_ids].logsumexp(1, keepdim=True)
    token_V = torch.arange(logits_TV.shape[1], device=logits_TV.device)
    masked_TV = logits_TV.masked_fill(torch.isin(token_V, stop_ids), -math.inf)
    return torch.where(token_V == vocabulary.stop_event, merged_T1, masked_TV).log_softmax(1)
