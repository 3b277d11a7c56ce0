"""A running mean of the weights, for a teacher that follows the student."""

from __future__ import annotations

import torch
from torch import Tensor

from opsd.learner.model import DistillationModel


class WeightMean:
    """mean <- decay * mean + (1 - decay) * weights after every step; begins with the weights. Sharded as they are."""

    def __init__(self, model: DistillationModel, decay: float) -> None:
        self.decay = decay
        self.shards: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: DistillationModel) -> None:
        for name, parameter in model.named_parameters():
            self.shards[name].lerp_(parameter.detach(), 1.0 - self.decay)
