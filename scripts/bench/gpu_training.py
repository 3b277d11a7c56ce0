"""Parts of gpu_check.py that must hold: a tiny student's attention and training step against plainer ways."""
# L packed tokens, D width, N kept tokens

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from gpu_errors import DTYPES, SLACK, Check, relative_error
from opsd.config.run import LearnerConfig
from opsd.learner.attention import packed_attention_name
from opsd.learner.model import DistillationModel, shard
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.learner.packing import MicroBatch
from opsd.learner.step import train_step
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Vocabulary
from random_batches import random_micro_batches

TINY = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,  # grouped queries
    head_dim=64,
    max_position_embeddings=1024,
    initializer_range=0.1,  # the default is so small that attention hardly counts
)
TINY_VOCABULARY = Vocabulary(size=500, stop_ids=(3, 11))
RESPONSES = [70, 1, 120, 30]
STEPS = 6


def packed_attention(*, device: str, dtype: str) -> list[Check]:
    """A packed row against each of its sequences alone, in values and gradients; the truth: alone, in float32."""
    name = packed_attention_name(device, dtype)
    packed, alone = (tiny_student(device, dtype, name) for _ in range(2))
    in_float32 = tiny_student(device, "float32", "sdpa")
    found, other, exact = (
        losses_and_gradients(model, tiny_batches(micro_batch_tokens), device)
        for model, micro_batch_tokens in ((packed, 10_000), (alone, 1), (in_float32, 1))
    )
    return against_plain(name, found, other, exact, dtype)


def training_step(*, device: str, dtype: str) -> list[Check]:
    """FSDP2 on one rank: gradients of the model that is not sharded, with and without activation checkpointing; then
    steps on one batch, whose loss must fall."""
    join_one_rank(device)
    plain = tiny_student(device, dtype, packed_attention_name(device, dtype))
    other, exact = (
        losses_and_gradients(model, tiny_batches(200), device)
        for model in (plain, tiny_student(device, "float32", packed_attention_name(device, "float32")))
    )
    checks = []
    for checkpointing in (False, True):
        found = losses_and_gradients(sharded_student(device, dtype, checkpointing), tiny_batches(200), device)
        name = "sharded, activation checkpointing" if checkpointing else "sharded"
        checks += against_plain(name, found, other, exact, dtype)
    model = sharded_student(device, dtype, checkpointing=False)
    cfg = LearnerConfig(learning_rate=3e-3, schedule="constant")
    optimizer = build_optimizer(model.parameters(), cfg)
    scheduler = build_scheduler(optimizer, cfg, STEPS)
    on = {"device": torch.device(device), "max_grad_norm": 1.0}
    reports = [train_step(model, optimizer, scheduler, tiny_batches(200), **on) for _ in range(STEPS)]
    share = reports[-1].loss / reports[0].loss
    masters = sum(p.dtype != torch.float32 for p in model.parameters())
    return [
        *checks,
        Check(what=f"loss after {STEPS} steps, share of the first", error=share, allowed=0.9),
        Check(what="weights that are not kept in float32", error=float(masters), allowed=0.0),
    ]


def against_plain(
    name: str,
    found: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    dtype: str,
) -> list[Check]:
    """Values and gradients that are `found`, those of a plainer way in the same dtype, and those in float32."""
    parts = zip(("values", "gradients"), found, other, exact, strict=True)
    return [
        Check(
            what=f"{name}: {part}",
            error=relative_error(own, truth),
            allowed=2.0 * relative_error(plain, truth) + SLACK[dtype],
        )
        for part, own, plain, truth in parts
    ]


def tiny_student(device: str, dtype: str, attention: str) -> DistillationModel:
    """The same random weights, rounded to bfloat16, in any dtype."""
    torch.manual_seed(0)
    with torch.device(device):
        causal_lm: PreTrainedModel = AutoModelForCausalLM.from_config(
            Qwen3Config(**TINY), dtype=DTYPES[dtype], attn_implementation=attention
        )
    causal_lm.load_state_dict({name: weight.to(DTYPES[dtype]) for name, weight in tiny_weights(device).items()})
    return DistillationModel(causal_lm.eval(), reverse_kl, TINY_VOCABULARY)


@cache
def tiny_weights(device: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Qwen3Config(**TINY), dtype=torch.bfloat16).to(device).state_dict()


def tiny_batches(micro_batch_tokens: int) -> list[MicroBatch]:
    return random_micro_batches(
        RESPONSES,
        prompt_tokens=5,
        top_k=8,
        ratio=0.7,
        vocabulary=TINY_VOCABULARY,
        micro_batch_tokens=micro_batch_tokens,
    )


def sharded_student(device: str, dtype: str, checkpointing: bool) -> DistillationModel:
    model = tiny_student(device, "float32", packed_attention_name(device, dtype))
    shard(model, device=device, num_ranks=1, dtype=dtype, checkpointing=checkpointing)
    return model


def losses_and_gradients(model: DistillationModel, batches: list[MicroBatch], device: str) -> tuple[Tensor, Tensor]:
    """The divergence of each kept token in the batch's order, and all gradients as one vector."""
    values, index = [], []
    for batch in (batch.to(torch.device(device)) for batch in batches):
        loss, value_N = model(batch)
        loss.backward()
        values.append(value_N)
        index.append(batch.index_N)
    gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
    return torch.cat(values)[torch.cat(index).argsort()], torch.cat([g.flatten().double() for g in gradients])


def join_one_rank(device: str) -> None:
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
