"""What the choice of named tokens costs: the sparse loss against the dense one, and the selections that follow.

    python scripts/bench/bench_support.py outputs/smollm2-pair train.jsonl --prompt-key question --chat-template

The student answers prompts; both models' dense distributions on these answers are the truth. Table 1: the reverse KL
and its gradient for each support and K. Table 2: the same at a temperature (`idts`, `adakd`), and what there is of it
where the student is its own teacher. Table 3: which half of the tokens soft_or selects from each source of statistics,
and what that costs. All in float32 (the dense side in float64), transformers engines.
"""
# T response tokens of all rollouts, V vocabulary, D width, U support size, B = U + 1 buckets

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bench_setup import load_setup, parse_args, print_table
from opsd.batch import rollout_stats
from opsd.cluster.ray import ray_cluster
from opsd.config.engine import RolloutConfig
from opsd.config.run import LearnerConfig, RunConfig
from opsd.engines.events import in_order
from opsd.engines.pool import request_seed
from opsd.engines.transformers import TransformersEngine
from opsd.learner.group import LearnerGroup
from opsd.learner.packing import kept_buckets
from opsd.ops.align import predicting_rows
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import DIVERGENCES, forward_kl, reverse_kl
from opsd.preflight import Setup
from opsd.types import Rollout, Sampling, ScoredRollout, Selection, TokenStats, Vocabulary
from tip.scores import SCORES
from tip.selectors import SELECTORS

TOP_KS = (16, 64, 256)
NUM_CANDIDATES = (16, 32, 64)
TEMPERATURES = (0.6, 1.0, 1.25, 1.65)  # idts at base 1 gives 0.61 to 1.65
TEMPERED_TOP_K = 64


class Dense(NamedTuple):
    """The truth on all response tokens."""

    hidden_TD: Tensor  # float32, the student's
    weight_VD: Tensor  # float32, the student's head
    stats: TokenStats
    grad_hidden_TD: Tensor  # of the mean reverse KL
    grad_weight_VD: Tensor
    teacher_logprobs: list[Tensor]  # float32 [T, V] of each rollout


def main() -> None:
    args = parse_args(__doc__, ("--num-rollouts", {"type": int, "default": 24}))
    num_known = max(TOP_KS)
    rollout = RolloutConfig(backend="transformers", max_response_tokens=args.max_tokens, num_candidates=num_known)
    cfg, setup = load_setup(args, rollout, teacher_top_k=num_known)
    scored = make_scored(cfg, setup, args.num_rollouts)
    dense = dense_truth(cfg, [item.rollout for item in scored], setup.vocabulary, setup.device)
    print(
        f"{len(scored)} rollouts, {len(dense.hidden_TD)} tokens, V {setup.vocabulary.size}; dense reverse KL "
        f"{dense.stats.reverse_kl_T.mean():.4f} nats, forward {dense.stats.forward_kl_T.mean():.4f}, "
        f"entropy {dense.stats.entropy_T.mean() * math.log(setup.vocabulary.size):.4f}"
    )
    support_table(scored, dense, setup.vocabulary)
    temperature_table(dense, setup.vocabulary, [len(item.rollout) for item in scored])
    selection_table(cfg, setup, scored, dense)


def make_scored(cfg: RunConfig, setup: Setup, num_rollouts: int) -> list[ScoredRollout]:
    """Answers of the student with the teacher's scores; each side names as many tokens as any row of a table wants."""
    shared = {"vocabulary": setup.vocabulary, "device": setup.device, "max_model_tokens": setup.max_model_tokens}
    num_tokens, num_candidates = cfg.rollout.max_response_tokens, cfg.rollout.num_candidates
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=num_tokens, num_candidates=num_candidates)
    prompts = setup.train_prompts[:num_rollouts]
    student = TransformersEngine(cfg.student.path, config=cfg.rollout, **shared)
    seeds = [request_seed(cfg.seed, 0, prompt.index, 0) for prompt in prompts]
    rollouts = in_order(student.generate(prompts, [0] * len(prompts), seeds, sampling, policy_version=0))
    teacher = TransformersEngine(cfg.teacher.path, config=cfg.teacher, max_batch_tokens=1024, **shared)
    scores = teacher.score(rollouts, cfg.teacher.top_k)
    return [ScoredRollout(rollout=r, scores=s) for r, s in zip(rollouts, scores, strict=True)]


def dense_truth(cfg: RunConfig, rollouts: list[Rollout], vocabulary: Vocabulary, device: str) -> Dense:
    """Both models over whole answers, a rollout at a time; logits and softmax in float64."""
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


def support_table(scored: list[ScoredRollout], dense: Dense, vocabulary: Vocabulary) -> None:
    rows = []
    for support in ("teacher", "student", "union"):
        for top_k in TOP_KS:
            value_T, grad_hidden_TD, grad_weight_VD = sparse_gradients(
                [known(item, top_k, top_k) for item in scored], support, dense, vocabulary
            )
            difference_T = value_T.double().cpu() - dense.stats.reverse_kl_T
            rows.append(
                [
                    support,
                    str(top_k),
                    f"{difference_T.mean() / dense.stats.reverse_kl_T.mean():+.2%}",
                    f"{difference_T.abs().max():.4f}",
                    *agreement(grad_hidden_TD, dense.grad_hidden_TD),
                    *agreement(grad_weight_VD, dense.grad_weight_VD),
                ]
            )
    header = ["support", "K", "bias of the reverse KL", "largest gap, nats", "hidden gradient: cosine",
              "relative error", "head gradient: cosine", "relative error"]  # fmt: skip
    print_table("Sparse against dense reverse KL (student and union: K candidates of the student)", header, rows)


def sparse_gradients(
    scored: list[ScoredRollout], support: str, dense: Dense, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor, Tensor]:
    """(per token reverse KL [T], gradient of its mean to the hidden states [T, D] and to the head [V, D])."""
    buckets = kept_buckets(scored, np.arange(len(dense.hidden_TD)), support, vocabulary)
    support_TU, teacher_TB = map(torch.from_numpy, buckets)
    hidden_TD, weight_VD = (tensor.clone().requires_grad_() for tensor in (dense.hidden_TD, dense.weight_VD))
    loss, value_T = sparse_head_loss(
        hidden_TD,
        weight_VD,
        support_TU.to(hidden_TD.device),
        teacher_TB.to(hidden_TD.device),
        torch.full((len(hidden_TD),), 1 / len(hidden_TD), device=hidden_TD.device),
        reverse_kl,
        vocab_size=vocabulary.size,
        stop_ids=vocabulary.stop_ids,
    )
    loss.backward()
    return value_T, hidden_TD.grad, weight_VD.grad


def temperature_table(dense: Dense, vocabulary: Vocabulary, lengths: list[int]) -> None:
    """A teacher known by its top K events at temperature 1, against the dense loss of all logits over a temperature."""
    rows = []
    for name in ("reverse_kl", "forward_kl"):
        for temperature in TEMPERATURES:
            found, truth, equal = [], [], []
            for hidden_TD, teacher_TV in zip(dense.hidden_TD.split(lengths), dense.teacher_logprobs, strict=True):
                found.append(tempered_gradient(hidden_TD, teacher_TV, dense, vocabulary, name, temperature))
                leaf_TD = hidden_TD.double().requires_grad_()
                student_TV = events(leaf_TD @ dense.weight_VD[: vocabulary.size].double().T, vocabulary)
                own_TV = student_TV.detach()
                value_T = DIVERGENCES[name](
                    *((x / temperature).log_softmax(1) for x in (student_TV, teacher_TV.double()))
                )
                value_T.sum().backward()
                truth.append((value_T.detach(), leaf_TD.grad))
                equal.append(tempered_gradient(hidden_TD, own_TV, dense, vocabulary, name, temperature))
            value_T, grad_TD = (torch.cat(part) for part in zip(*found, strict=True))
            exact_T, exact_TD = (torch.cat(part) for part in zip(*truth, strict=True))
            own_T, own_TD = (torch.cat(part) for part in zip(*equal, strict=True))
            rows.append(
                [
                    name,
                    str(temperature),
                    f"{exact_T.mean():.4f}",
                    f"{value_T.mean():.4f}",
                    *agreement(grad_TD, exact_TD),
                    f"{own_T.mean():.1e}",
                    f"{own_TD.norm() / exact_TD.norm():.1e}",
                ]
            )
    header = ["divergence", "temperature", "dense, nats", "sparse", "hidden gradient: cosine", "relative error",
              "student = teacher: nats", "its gradient, of the dense norm"]  # fmt: skip
    print_table(f"At a temperature, the teacher's top {TEMPERED_TOP_K} known", header, rows)


def tempered_gradient(
    hidden_TD: Tensor, teacher_TV: Tensor, dense: Dense, vocabulary: Vocabulary, name: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """(value of each row, gradient of their sum to the hidden states [T, D])."""
    top = teacher_TV.topk(TEMPERED_TOP_K, dim=1)
    rest_TV = teacher_TV.scatter(1, top.indices, -math.inf)
    leaf_TD = hidden_TD.clone().requires_grad_()
    loss, value_T = sparse_head_loss(
        leaf_TD,
        dense.weight_VD,
        top.indices,
        torch.cat([top.values, rest_TV.logsumexp(1, keepdim=True)], dim=1),
        hidden_TD.new_ones(len(hidden_TD)),
        DIVERGENCES[name],
        temperature_N=hidden_TD.new_full((len(hidden_TD),), temperature),
        vocab_size=vocabulary.size,
        stop_ids=vocabulary.stop_ids,
    )
    loss.backward()
    return value_T, leaf_TD.grad


def agreement(found: Tensor, truth: Tensor) -> tuple[str, str]:
    found = found.double()
    cosine = (found * truth).sum() / (found.norm() * truth.norm())
    return f"{cosine:.5f}", f"{(found - truth).norm() / truth.norm():.2%}"


def selection_table(cfg: RunConfig, setup: Setup, scored: list[ScoredRollout], dense: Dense) -> None:
    """With ratio 0.5. The learner's pass and its step are those of a real LearnerGroup, one rank, best of three."""
    lengths = [len(item.rollout) for item in scored]
    rows = []
    with ray_cluster(dashboard=False):
        learner = LearnerGroup(
            cfg.student,
            LearnerConfig(micro_batch_tokens=2048),
            divergence=reverse_kl,
            support="teacher",
            vocabulary=setup.vocabulary,
            num_steps=8,
            device=setup.device,
        )
        learner.wait_ready()
        for top_k in TOP_KS:
            exact, seconds = timed(partial(learner.token_stats, [known(item, top_k, 16) for item in scored]))
            rows.append(["learner", str(top_k), "", "", *overlaps(exact, exact, dense, lengths), f"{seconds:.3f}"])
            for num_candidates in NUM_CANDIDATES:
                for is_scored in (True, False):
                    items = [known(item, top_k, num_candidates, candidates_scored=is_scored) for item in scored]
                    found, seconds = timed(partial(rollout_stats, items, setup.vocabulary))
                    source = "scored" if is_scored else "looked up in its top K"
                    rows.append(
                        ["rollout", str(top_k), str(num_candidates), source, *overlaps(found, exact, dense, lengths),
                         f"{seconds:.3f}"]
                    )  # fmt: skip
        items = [known(item, 64, 16) for item in scored]
        for ratio in (1.0, 0.5):
            _, seconds = timed(partial(learner.train_step, items, select(dense.stats, lengths, ratio)))
            print(f"a training step (K 64) at ratio {ratio}: {seconds:.3f} s")
    header = ["stats", "K", "C", "teacher's view of the candidates", "overlap with learner", "with dense", "seconds"]
    print_table("Tokens that soft_or keeps at ratio 0.5", header, rows)


def overlaps(found: TokenStats, exact: TokenStats, dense: Dense, lengths: list[int]) -> tuple[str, str]:
    """Share of the kept tokens that the exact statistics on buckets, and the dense ones, keep too."""
    kept = set(select(found, lengths).index_N.tolist())
    others = (set(select(stats, lengths).index_N.tolist()) for stats in (exact, dense.stats))
    return tuple(f"{len(kept & other) / len(kept):.3f}" for other in others)


def select(stats: TokenStats, lengths: list[int], ratio: float = 0.5) -> Selection:
    return SELECTORS["top_ratio"](SCORES["soft_or"](stats), lengths, ratio=ratio)


def timed(call: Callable) -> tuple[object, float]:
    """(result, seconds of the fastest of three calls)."""
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - began)
    return result, min(seconds)


if __name__ == "__main__":
    main()
