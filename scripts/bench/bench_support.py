"""What the choice of named tokens costs: the sparse loss against the dense one, and the selections that follow.

    python scripts/bench/bench_support.py outputs/smollm2-pair train.jsonl --prompt-key question --chat-template

The student answers prompts; both models' dense distributions on these answers are the truth. Table 1: the reverse KL
and its gradient for each support and K; with the residual for tokens that are drawn anew, once and on average over
several draws of every token; and from the teacher's hidden states. Table 2: the same at a temperature (`idts`,
`adakd`), and what there is of it where the student is its own teacher. Table 3: which half of the tokens soft_or
selects from each source of statistics, and what that costs. All in float32 (the dense side in float64), transformers
engines. `--student` takes a trained student in place of the pair's.
"""
# T response tokens of all rollouts, V vocabulary, D width, U support size, B = U + 1 buckets

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from bench_setup import load_setup, parse_args, print_table
from opsd.batch import held_here
from opsd.cluster.ray import ray_cluster
from opsd.config.engine import RolloutConfig
from opsd.config.loss import LossConfig
from opsd.config.run import LearnerConfig, RunConfig
from opsd.hooks import bind_objective
from opsd.learner.group import LearnerGroup
from opsd.learner.packing import pack, pack_whole
from opsd.learner.teacher_head import TeacherHead, load_teacher_head
from opsd.ops.head.exact import exact_head_loss
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import DIVERGENCES, reverse_kl
from opsd.payload.scored import ScoredBatch, rollout_stats
from opsd.preflight import Setup
from opsd.types import ScoredRollout, Selection, TokenStats, Vocabulary
from support_truth import Dense, dense_truth, events, known, make_scored, redrawn
from tip.scores import SCORES
from tip.selectors import SELECTORS

NUM_CANDIDATES = (16, 32, 64)
TEMPERATURES = (0.6, 1.0, 1.25, 1.65)  # idts at base 1 gives 0.61 to 1.65
TEMPERED_TOP_K = 64
Gradients = tuple[Tensor, Tensor, Tensor]  # value of each token, gradient to the hidden states, gradient to the head


def main() -> None:
    args = parse_args(
        __doc__,
        ("--num-rollouts", {"type": int, "default": 24}),
        (
            "--top-ks",
            {"type": int, "nargs": "+", "default": [16, 64, 256], "help": "K; of the residual the middle one"},
        ),
        ("--only-supports", {"action": "store_true", "help": "the first table alone"}),
        ("--num-draws", {"type": int, "default": 64, "help": "of every token, for the residual"}),
    )
    num_known = max(args.top_ks)
    rollout = RolloutConfig(backend="transformers", max_response_tokens=args.max_tokens, num_candidates=num_known)
    cfg, setup = load_setup(args, rollout, teacher_top_k=num_known)
    scored = make_scored(cfg, setup, args.num_rollouts)
    dense = dense_truth(cfg, [item.rollout for item in scored], setup.vocabulary, setup.device)
    print(
        f"{len(scored)} rollouts, {len(dense.hidden_TD)} tokens, V {setup.vocabulary.size}; dense reverse KL "
        f"{dense.stats.reverse_kl_T.mean():.4f} nats, forward {dense.stats.forward_kl_T.mean():.4f}, "
        f"entropy {dense.stats.entropy_T.mean() * math.log(setup.vocabulary.size):.4f}"
    )
    teacher = load_teacher_head(
        cfg.teacher.path, trust_remote_code=False, device=dense.hidden_TD.device, dtype="float32"
    )
    support_table(scored, dense, setup.vocabulary, args.top_ks, args.num_draws, teacher)
    if args.only_supports:
        return
    temperature_table(dense, setup.vocabulary, [len(item.rollout) for item in scored])
    selection_table(cfg, setup, scored, dense, args.top_ks)


def batch_of(items: Iterable[ScoredRollout]) -> ScoredBatch:
    return ScoredBatch(items=tuple(items))


def support_table(
    scored: list[ScoredRollout],
    dense: Dense,
    vocabulary: Vocabulary,
    top_ks: list[int],
    num_draws: int,
    teacher: TeacherHead,
) -> None:
    rows, drawn_k = [], sorted(top_ks)[len(top_ks) // 2]
    for support in ("teacher", "student", "union"):
        for top_k in top_ks:
            items = [known(item, top_k, top_k) for item in scored]
            rows.append([support, str(top_k), *against(sparse_gradients(items, support, dense, vocabulary), dense)])
    draws = redrawn([known(item, drawn_k, drawn_k) for item in scored], dense, vocabulary, num_draws)
    for support in ("teacher", "union"):
        first, *others = draws
        total = sparse_gradients(first, support, dense, vocabulary, residual=True)
        rows.append([f"{support} + residual, one draw", str(drawn_k), *against(total, dense)])
        for items in others:
            for tensor, addend in zip(
                total, sparse_gradients(items, support, dense, vocabulary, residual=True), strict=True
            ):
                tensor.add_(addend)
        means = tuple(tensor / num_draws for tensor in total)
        rows.append([f"{support} + residual, mean of {num_draws}", str(drawn_k), *against(means, dense)])
    rows.append(["none: hidden states", "", *against(exact_gradients(scored, dense, vocabulary, teacher), dense)])
    header = ["support", "K", "bias of the reverse KL", "largest gap, nats", "hidden gradient: cosine",
              "relative error", "head gradient: cosine", "relative error"]  # fmt: skip
    print_table("Sparse against dense reverse KL (student and union: K candidates of the student)", header, rows)


def against(gradients: Gradients, dense: Dense) -> list[str]:
    """The columns of a row of the table."""
    value_T, grad_hidden_TD, grad_weight_VD = gradients
    difference_T = value_T.double().cpu() - dense.stats.reverse_kl_T
    return [
        f"{difference_T.mean() / dense.stats.reverse_kl_T.mean():+.2%}",
        f"{difference_T.abs().max():.4f}",
        *agreement(grad_hidden_TD, dense.grad_hidden_TD),
        *agreement(grad_weight_VD, dense.grad_weight_VD),
    ]


def sparse_gradients(
    scored: list[ScoredRollout], support: str, dense: Dense, vocabulary: Vocabulary, *, residual: bool = False
) -> Gradients:
    """(per token reverse KL [T], gradient of its mean to the hidden states [T, D] and to the head [V, D])."""
    every = Selection(index_N=torch.arange(len(dense.hidden_TD)), weight_N=torch.ones(len(dense.hidden_TD)))
    objective = bind_objective(LossConfig(residual=residual))
    batch = pack_whole(batch_of(scored), every, support, vocabulary, asked=objective.inputs).to(dense.hidden_TD.device)
    hidden_TD, weight_VD = (tensor.clone().requires_grad_() for tensor in (dense.hidden_TD, dense.weight_VD))
    loss, value_T = sparse_head_loss(
        hidden_TD,
        weight_VD,
        batch.support_NU,
        batch.teacher_logprobs_NB,
        batch.weight_N,
        objective,
        vocab_size=vocabulary.size,
        stop_ids=vocabulary.stop_ids,
        row_inputs=objective.takes(batch.inputs),
    )
    loss.backward()
    return value_T, hidden_TD.grad, weight_VD.grad


def exact_gradients(
    scored: list[ScoredRollout], dense: Dense, vocabulary: Vocabulary, teacher: TeacherHead
) -> Gradients:
    """As `sparse_gradients`, with loss.payload=hidden."""
    hidden_TD, weight_VD = (tensor.clone().requires_grad_() for tensor in (dense.hidden_TD, dense.weight_VD))
    every = Selection(index_N=torch.arange(len(hidden_TD)), weight_N=torch.ones(len(hidden_TD)))
    whole = {"num_ranks": 1, "max_tokens": len(hidden_TD) ** 2, "with_hidden": True}
    [[batch]] = pack(batch_of(scored), every, "sampled", vocabulary, **whole)
    loss, value_T = exact_head_loss(
        hidden_TD,
        weight_VD,
        batch.teacher_hidden_NE[batch.index_N.argsort()].to(hidden_TD.device),
        teacher.weight_VE,
        torch.full((len(hidden_TD),), 1 / len(hidden_TD), device=hidden_TD.device),
        DIVERGENCES["reverse_kl"],
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


def selection_table(cfg: RunConfig, setup: Setup, scored: list[ScoredRollout], dense: Dense, top_ks: list[int]) -> None:
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
        for top_k in top_ks:
            here = held_here([known(item, top_k, 16) for item in scored], setup.vocabulary)
            exact, seconds = timed(partial(learner.token_stats, here))
            rows.append(["learner", str(top_k), "", "", *overlaps(exact, exact, dense, lengths), f"{seconds:.3f}"])
            for num_candidates in NUM_CANDIDATES:
                for is_scored in (True, False):
                    items = batch_of(known(item, top_k, num_candidates, candidates_scored=is_scored) for item in scored)
                    found, seconds = timed(partial(rollout_stats, items, setup.vocabulary))
                    source = "scored" if is_scored else "looked up in its top K"
                    rows.append(
                        ["rollout", str(top_k), str(num_candidates), source, *overlaps(found, exact, dense, lengths),
                         f"{seconds:.3f}"]
                    )  # fmt: skip
        items = held_here([known(item, 64, 16) for item in scored], setup.vocabulary)
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
