"""Parts of gpu_check.py that measure: matmul peak, the head's loss with its gradients, and a whole training step."""
# N rows, D width, V vocabulary, K teacher top-k

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from bench_head import time_methods
from gpu_errors import DTYPES
from gpu_training import join_one_rank
from head_methods import METHODS
from head_rows import Rows
from measure import PeakMemory, clock
from opsd.config.run import LearnerConfig
from opsd.learner.attention import packed_attention_name
from opsd.learner.model import DistillationModel, shard
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.learner.packing import MicroBatch
from opsd.learner.step import train_step
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import StepReport, Vocabulary
from random_batches import random_micro_batches

GB = 1e9  # as the paper counts
QWEN3 = dict(vocab_size=151_936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
SHAPES = {
    "Qwen3-1.7B": dict(
        QWEN3, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16
    ),
    "Qwen3-4B": dict(QWEN3, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "tiny": dict(
        QWEN3, vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8
    ),
}  # fmt: skip
Step = Callable[[list[MicroBatch]], StepReport]
_built: dict[tuple, Step] = {}  # the last model, for the next ratios


def matmul_peak(*, device: str, dtype: str, size: int, repeats: int) -> dict[str, float]:
    """TFLOP/s of one large square product, the best of several."""
    return {"tflops": peak_tflops(device, dtype, size, repeats)}


@cache
def peak_tflops(device: str, dtype: str, size: int, repeats: int) -> float:
    left, right = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    seconds = []
    for _ in range(repeats + 1):  # the first chooses its kernel
        start = clock(device)
        for _ in range(10):
            left @ right
        seconds.append((clock(device) - start) / 10)
    return 2 * size**3 / min(seconds[1:]) / 1e12


def head_speed(
    *, device: str, dtype: str, method: str, rows: int, width: int, vocab: int, top_k: int, repeats: int, peak: dict
) -> dict[str, float]:
    """Of one way to loss and gradients. FLOPs are those of the three products that any exact way needs, 6 N V D."""
    run = METHODS[method](random_rows(device, dtype, rows, width, vocab, top_k))
    seconds = time_methods({method: run}, device, repeats)[method]
    with PeakMemory(device) as memory:
        gradients = run()
    del gradients
    tflops = 6 * rows * vocab * width / seconds / 1e12
    return {
        "ms": seconds * 1e3,
        "tflops": tflops,
        "share_of_peak": tflops / peak_tflops(device, dtype, **peak),
        "peak_gb": memory.bytes / GB,
    }


@lru_cache(maxsize=1)
def random_rows(device: str, dtype: str, rows: int, width: int, vocab: int, top_k: int) -> Rows:
    """As head_rows.random_rows, but made on the device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    first_N1 = torch.randint(vocab, (rows, 1), generator=generator, device=device)
    return Rows(
        hidden_ND=normal(rows, width).to(DTYPES[dtype]),
        weight_VD=normal(vocab, width).mul_(width**-0.5).to(DTYPES[dtype]),
        support_NK=(first_N1 + torch.arange(top_k, device=device) * (vocab // top_k)) % vocab,
        teacher_logprobs_NB=normal(rows, top_k + 1).mul_(2.0).log_softmax(1),
    )


def step_speed(
    *,
    device: str,
    dtype: str,
    model: str,
    tokens: int,
    response_tokens: int,
    prompt_tokens: int,
    top_k: int,
    ratio: float,
    checkpointing: bool,
    repeats: int,
) -> dict[str, float]:
    """Seconds and peak memory of a step on one packed micro-batch; weights, moments and gradients are in the peak."""
    step = built_step(device, dtype, model, checkpointing)
    batches = random_micro_batches(
        [response_tokens] * (tokens // (prompt_tokens + response_tokens)),
        prompt_tokens=prompt_tokens,
        top_k=top_k,
        ratio=ratio,
        vocabulary=Vocabulary(size=SHAPES[model]["vocab_size"], stop_ids=(0,)),
        micro_batch_tokens=tokens,
    )
    seconds = []
    try:
        report = step(batches)  # makes the optimiser's moments, and chooses kernels
        held = torch.cuda.memory_allocated() if device == "cuda" else 0
        with PeakMemory(device) as memory:
            for _ in range(repeats):
                start = clock(device)
                step(batches)
                seconds.append(clock(device) - start)
    except RuntimeError:  # out of memory: what the broken step left would be in the way of the next
        _built.clear()
        raise
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "tokens_per_s": report.num_trunk_tokens / median,
        "trunk_tokens": report.num_trunk_tokens,
        "kept_tokens": report.num_kept,
        "peak_gb": (held + memory.bytes) / GB,
        "weights_and_moments_gb": held / GB,
    }


def built_step(device: str, dtype: str, model: str, checkpointing: bool) -> Step:
    key = (device, dtype, model, checkpointing)
    if key not in _built:
        _built.clear()  # two models of 4B do not fit
        free_memory(device)
        _built[key] = build_step(device, dtype, SHAPES[model], checkpointing)
    return _built[key]


def build_step(device: str, dtype: str, shape: dict[str, Any], checkpointing: bool) -> Step:
    """The learner's step of a model with random weights, made on the device."""
    join_one_rank(device)
    torch.manual_seed(0)
    with torch.device(device):
        causal_lm = AutoModelForCausalLM.from_config(
            Qwen3Config(**shape, max_position_embeddings=40_960),
            dtype=torch.float32,
            attn_implementation=packed_attention_name(device, dtype),
        )
    distilled = DistillationModel(causal_lm.eval(), reverse_kl, Vocabulary(size=shape["vocab_size"], stop_ids=(0,)))
    shard(distilled, device=device, num_ranks=1, dtype=dtype, checkpointing=checkpointing)
    learner = LearnerConfig(schedule="constant")
    optimizer = build_optimizer(distilled.parameters(), learner)
    scheduler = build_scheduler(optimizer, learner, num_steps=100)
    return partial(train_step, distilled, optimizer, scheduler, device=torch.device(device), max_grad_norm=1.0)


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
