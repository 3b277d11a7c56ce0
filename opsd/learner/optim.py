"""The optimiser and the learning rate's course."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from opsd.config.run import LearnerConfig


def build_optimizer(parameters: Iterable[nn.Parameter], cfg: LearnerConfig) -> torch.optim.AdamW:
    """AdamW of those that train; where the weights are on a GPU as one kernel over all of them (not run on a GPU)."""
    trained, (beta1, beta2) = [p for p in parameters if p.requires_grad], cfg.adam_betas
    return torch.optim.AdamW(
        trained,
        lr=cfg.learning_rate,
        betas=(beta1, beta2),
        weight_decay=cfg.weight_decay,
        fused=True if all(p.is_cuda for p in trained) else None,
    )


def build_scheduler(
    optimizer: torch.optim.Optimizer, cfg: LearnerConfig, num_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    shape = partial(
        learning_rate_factor,
        schedule=cfg.schedule,
        num_steps=num_steps,
        warmup_steps=cfg.warmup_steps,
        min_ratio=cfg.min_lr_ratio,
    )
    return torch.optim.lr_scheduler.LambdaLR(optimizer, shape)


def learning_rate_factor(step: int, *, schedule: str, num_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """The share of the peak learning rate at optimiser step `step`, from 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
