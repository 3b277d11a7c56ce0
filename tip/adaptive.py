"""AdaKD: a share of kept tokens that follows the loss, and a temperature that follows each token's difficulty.

The two are independent of each other and of the divergence. Source: arXiv 2510.11615;
docs/selection.md, Schedules and temperatures.
"""
# N tokens

from __future__ import annotations

import math

import torch
from torch import Tensor


class LossDrivenRatio:
    """Which share of the tokens to keep (LATF): less while the loss falls, more when it rises.

    `update` takes the globally reduced loss of each optimiser step and follows its exponential mean, which the first
    loss starts (no pull towards 0). During the first `num_warmup` updates the ratio stays at `initial`; the mean at
    their end (of the first loss where there is no warm-up) is the reference. From then on a mean that is further than
    `loss_tolerance`, relative, below the reference shrinks the ratio by the factor 1 - `ratio_step`, down to `floor`,
    and one that is as far above grows it by 1 + `ratio_step`, up to 1. Either makes that mean the new reference, also
    where the ratio already stood at its bound. The paper warms up for 5 % of the steps; the floor is its authors' code
    (SassyRong/AdaKD, distillation.py). Relative means a share of the reference's size, so a loss below 0 works alike
    (the authors' code would shrink at every step); at a reference of 0 any change counts.
    """

    def __init__(
        self,
        *,
        initial: float = 1.0,
        num_warmup: int = 0,
        beta: float = 0.99,
        loss_tolerance: float = 0.05,
        ratio_step: float = 0.05,
        floor: float = 0.1,
    ) -> None:
        if not 0.0 < floor <= initial <= 1.0:
            raise ValueError(f"need 0 < floor <= initial <= 1, got floor {floor} and initial {initial}")
        if num_warmup < 0:
            raise ValueError(f"num_warmup must be >= 0, got {num_warmup}")
        for name, share in (("beta", beta), ("loss_tolerance", loss_tolerance), ("ratio_step", ratio_step)):
            if not 0.0 <= share < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {share}")
        self.ratio = initial  # the share of tokens to keep in the next step
        self._num_warmup = num_warmup
        self._beta = beta
        self._loss_tolerance = loss_tolerance
        self._ratio_step = ratio_step
        self._floor = floor
        self._num_updates = 0
        self._mean = self._reference = 0.0  # until the first loss

    def update(self, loss: float) -> float:
        """The ratio after a step with this loss. Raises ValueError, and changes nothing, where it is not finite."""
        if not math.isfinite(loss):
            raise ValueError(f"loss must be finite, got {loss}")
        self._num_updates += 1
        self._mean = loss if self._num_updates == 1 else self._beta * self._mean + (1.0 - self._beta) * loss
        if self._num_updates <= max(1, self._num_warmup):
            self._reference = self._mean
            return self.ratio
        bounds = (self._reference * (1.0 - self._loss_tolerance), self._reference * (1.0 + self._loss_tolerance))
        if self._mean < min(bounds):
            self.ratio = max(self._floor, self.ratio * (1.0 - self._ratio_step))
            self._reference = self._mean
        elif self._mean > max(bounds):
            self.ratio = min(1.0, self.ratio * (1.0 + self._ratio_step))
            self._reference = self._mean
        return self.ratio

    def state_dict(self) -> dict[str, float]:
        """What has changed since the start, as plain numbers: for a checkpoint. The settings are the config's."""
        return {
            "ratio": self.ratio,
            "num_updates": self._num_updates,
            "mean": self._mean,
            "reference": self._reference,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a `state_dict`. Raises KeyError where an entry is missing."""
        self.ratio = state["ratio"]
        self._num_updates = int(state["num_updates"])
        self._mean, self._reference = state["mean"], state["reference"]


def inverse_difficulty_temperature(difficulty_N: Tensor, *, base: float = 1.0, strength: float = 0.5) -> Tensor:
    """A low temperature for a hard token, a high one for an easy one (IDTS): detached, [N].

    base * exp(-strength * h), h = tanh(log(s / median(s))), for difficulties s >= 0 (Hellinger distances, say). So it
    lies in base * [exp(-strength), exp(strength)]: a token at the median has `base`, one with s = 0 the highest. Where
    the median is 0, so many tokens are perfect that they are the norm: they have `base`, the others the lowest.
    The median of an even number is the lower of the middle two, as torch's. It is that of the tokens given: give the
    whole batch, as it does not come out the same in parts. A token's loss at temperature t is to be multiplied by t^2.
    Raises ValueError for a negative or NaN difficulty, for a base <= 0 and a strength < 0.
    """
    if not base > 0.0:
        raise ValueError(f"base must be > 0, got {base}")
    if not strength >= 0.0:
        raise ValueError(f"strength must be at least 0, got {strength}")
    difficulty_N = difficulty_N.detach()
    if not (difficulty_N >= 0.0).all():
        raise ValueError("difficulties must be >= 0")
    # tanh(log(s / m)) = (s^2 - m^2) / (s^2 + m^2), which has no log(0); the larger of the two is scaled to 1.
    median = difficulty_N.median()
    largest_N = difficulty_N.clamp_min(median)
    scale_N = largest_N.where(largest_N > 0.0, 1.0)
    own_N, median_N = (difficulty_N / scale_N).square(), (median / scale_N).square()
    hardness_N = (own_N - median_N) / (own_N + median_N).where(largest_N > 0.0, 1.0)
    return base * torch.exp(-strength * hardness_N)
