"""A whole learner step at several kept ratios: its time, its peak memory, and the share of each part.

    python scripts/bench/bench_step.py                  the shape of SmolLM2-135M, 4,096 tokens, random weights

Real parts: packing, FSDP2 with one rank, the sparse loss, AdamW. The tokens that stay are drawn at random from each
response, the worst case for the cut after the last kept row. Row "dense" is the same step with the logits of every
response token of both models, as full-vocabulary distillation computes them; the teacher's are given, and the head's
backward pass counts as the trunk's. Every way runs in two fresh processes: one times steps after a warm-up, the median
counts; in the other peak memory is measured, above weights and optimiser state, gradients included. On one CPU thread
the clock is the process's CPU time. `--device cuda` has not been run by us.
"""
# L tokens of a packed micro-batch, N kept tokens, T response tokens, V vocabulary, D width

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial, wraps
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import opsd.learner.model
from measure import PeakMemory, clock, give_freed_memory_back, markdown
from opsd.config.run import LearnerConfig
from opsd.learner.attention import packed_attention_name
from opsd.learner.model import DistillationModel, shard
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.learner.packing import MicroBatch
from opsd.learner.step import train_step
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import StepReport, Vocabulary
from random_batches import random_micro_batches

SMOLLM2_135M = dict(
    hidden_size=576,
    num_hidden_layers=30,
    intermediate_size=1536,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49_152,
    tie_word_embeddings=True,
)
VOCABULARY = Vocabulary(size=SMOLLM2_135M["vocab_size"], stop_ids=(0,))
DENSE_ROWS = 256  # of one log-softmax of the dense way
PARTS = ("head", "trunk", "optimiser")


class DenseModel(DistillationModel):
    """The same student with reverse KL on full logits that autograd keeps. The teacher's are random, made once."""

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return self._head(self._hidden(batch), batch.weight_N)

    def _head(self, hidden_ND: Tensor, weight_N: Tensor) -> tuple[Tensor, Tensor]:
        student_NV = self.causal_lm.get_output_embeddings()(hidden_ND)
        parts = zip(student_NV.split(DENSE_ROWS), teacher_logits(student_NV).split(DENSE_ROWS), strict=True)
        values = []
        for student_CV, teacher_CV in parts:
            log_p_CV, log_q_CV = student_CV.float().log_softmax(1), teacher_CV.float().log_softmax(1)
            values.append((log_p_CV.exp() * (log_p_CV - log_q_CV)).sum(1))
        per_token_N = torch.cat(values)
        return (weight_N * per_token_N).sum(), per_token_N.detach()


_teacher_logits: dict[str, Tensor] = {}


def teacher_logits(like_NV: Tensor) -> Tensor:
    held = _teacher_logits.get("NV")
    if held is None or len(held) < len(like_NV):
        _teacher_logits["NV"] = held = torch.randn_like(like_NV.detach())
    return held[: len(like_NV)]


@dataclass(frozen=True, kw_only=True)
class Measured:
    seconds: float  # median of the steps
    parts: dict[str, float]  # seconds, of the same step
    trunk_tokens: int


class PartClock:
    """Adds up the seconds of the functions that it wraps, by part; what a wrapped one calls inside is its own."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = clock(self.device)
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += clock(self.device) - start

        setattr(owner, name, timed)


def measure_time(way: str, ratio: float, args: argparse.Namespace) -> Measured:
    """Of one way in this process, which must be fresh."""
    parts = PartClock(args.device)
    parts.wrap(opsd.learner.model, "sparse_head_loss", "head")
    parts.wrap(DenseModel, "_head", "head")
    parts.wrap(DistillationModel, "_hidden", "trunk")
    parts.wrap(torch.Tensor, "backward", "backward")
    parts.wrap(torch.nn.utils, "clip_grad_norm_", "optimiser")
    step = build_step(way, args, optimiser_clock=parts)
    micro_batches = micro_batches_of(ratio, args, args.tokens)
    step(micro_batches)
    runs = []
    for _ in range(args.repeats):
        parts.seconds.clear()
        start = clock(args.device)
        report = step(micro_batches)
        runs.append((clock(args.device) - start, dict(parts.seconds)))
    seconds, of_parts = min(runs, key=lambda run: abs(run[0] - statistics.median(r[0] for r in runs)))
    # The sparse loss forms its gradients going forward: what backward takes is the trunk's (of the dense way, both's).
    of_parts["trunk"] += of_parts.pop("backward")
    return Measured(seconds=seconds, parts=of_parts, trunk_tokens=report.num_trunk_tokens)


def measure_peak_gib(way: str, ratio: float, args: argparse.Namespace) -> float:
    """Above weights and optimiser's state, of one way in this process, which must be fresh."""
    if args.device == "cpu":
        give_freed_memory_back()
    step = build_step(way, args)
    small = micro_batches_of(1.0, args, args.prompt_tokens + args.response_tokens)
    step(small)  # makes the optimiser's state
    micro_batches = micro_batches_of(ratio, args, args.tokens)
    if way == "dense":
        teacher_logits(torch.empty(max(len(batch.row_N) for batch in micro_batches), SMOLLM2_135M["vocab_size"]))
    with PeakMemory(args.device) as peak:
        step(micro_batches)
    return peak.bytes / 2**30


def build_step(
    way: str, args: argparse.Namespace, optimiser_clock: PartClock | None = None
) -> Callable[[list[MicroBatch]], StepReport]:
    """The learner's step on given micro-batches, of a model with random weights."""
    torch.manual_seed(0)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    shape = {**SMOLLM2_135M, "num_hidden_layers": args.layers}
    attention = packed_attention_name(args.device, "float32")
    causal_lm = AutoModelForCausalLM.from_config(
        LlamaConfig(**shape), dtype=torch.float32, attn_implementation=attention
    )
    causal_lm.to(args.device).eval()
    model = (DenseModel if way == "dense" else DistillationModel)(causal_lm, reverse_kl, VOCABULARY)
    shard(model, device=args.device, num_ranks=1, dtype=args.dtype)
    learner = LearnerConfig(micro_batch_tokens=args.micro_batch_tokens)
    optimizer = build_optimizer(model.parameters(), learner)
    scheduler = build_scheduler(optimizer, learner, num_steps=100)  # it insists on an unwrapped optimizer.step
    if optimiser_clock is not None:
        optimiser_clock.wrap(optimizer, "step", "optimiser")
    device = torch.device(args.device)
    return partial(train_step, model, optimizer, scheduler, device=device, max_grad_norm=1.0)


def micro_batches_of(ratio: float, args: argparse.Namespace, num_tokens: int) -> list[MicroBatch]:
    """`num_tokens` tokens in rollouts of one length, a random share `ratio` of each response kept."""
    length = args.prompt_tokens + args.response_tokens
    return random_micro_batches(
        [args.response_tokens] * (num_tokens // length),
        prompt_tokens=args.prompt_tokens,
        top_k=args.top_k,
        ratio=ratio,
        vocabulary=VOCABULARY,
        micro_batch_tokens=args.micro_batch_tokens,
    )


def in_fresh_process(measure: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of forward and backward")
    parser.add_argument("--tokens", type=int, default=4096, help="of the whole batch, prompts included")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=448)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=SMOLLM2_135M["num_hidden_layers"])
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    if args.tokens < args.prompt_tokens + args.response_tokens:
        parser.error("--tokens must hold at least one prompt with its response")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    ways = [("dense", 1.0), *(("sparse", ratio) for ratio in args.ratios)]
    found, peak_gib = {}, {}
    for way, ratio in ways:
        found[way, ratio] = in_fresh_process(measure_time, way, ratio, args)
        peak_gib[way, ratio] = in_fresh_process(measure_peak_gib, way, ratio, args)
        print(
            f"{way} at {ratio:g}: {found[way, ratio].seconds:.1f} s, {peak_gib[way, ratio]:.2f} GiB",
            file=sys.stderr,
            flush=True,
        )
    full = found["sparse", args.ratios[0]]
    table = [["way", "kept", "trunk tokens", f"time of sparse at {args.ratios[0]:g}", *PARTS, "the rest", "peak GiB"]]
    for (way, ratio), one in found.items():
        shares = [one.parts[part] / one.seconds for part in PARTS]
        shares.append(1 - sum(shares))
        time = f"{one.seconds / full.seconds:.3f}"
        row = [
            way,
            f"{ratio:g}",
            str(one.trunk_tokens),
            time,
            *(f"{x:.1%}" for x in shares),
            f"{peak_gib[way, ratio]:.2f}",
        ]
        table.append(row)
    print(f"\n{args.dtype} on {args.device}, {torch.get_num_threads()} threads, {args.layers} layers, {args.tokens} ")
    print(f"tokens in micro-batches of {args.micro_batch_tokens}; sparse at {args.ratios[0]:g}: {full.seconds:.2f} s\n")
    print(markdown(table))


if __name__ == "__main__":
    main(sys.argv[1:])
