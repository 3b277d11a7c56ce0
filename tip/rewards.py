"""From a verifier's rewards of a step's rollouts to advantages and weights, rollout by rollout.

`group_R` names the prompt of each rollout with any integers: the rollouts of one prompt are a group. All functions
take [R], return [R] (float32, or wider where the rewards are) and raise ValueError where the shapes differ or an
option leaves its range. Source: docs/losses.md, Objectives with rewards.
"""
# R rollouts, G groups

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(reward_R: Tensor, group_R: Tensor, *, unbiased: bool = False) -> Tensor:
    """(reward - mean) / standard deviation within each group; 0 in a group of equal rewards. Source: GRPO.

    The deviation is the population's: the squares' sum divided by the group's size G. `unbiased`: by G - 1, as
    torch.std does in verl (trainer/ppo/core_algos.py) and TRL (GRPOTrainer), which makes the advantages smaller by the
    factor sqrt((G - 1) / G), 0.87 at 4 answers per prompt. Neither adds an epsilon. KDRL's own code is not public.
    """
    reward_R, place_R, size_G = _grouped(reward_R, group_R)
    low_G, high_G = (_reduce(reward_R, place_R, size_G, how) for how in ("amin", "amax"))
    centred_R = reward_R - _mean(reward_R, place_R, size_G)[place_R]
    divisor_G = (size_G - 1).clamp_min(1) if unbiased else size_G
    deviation_R = (_reduce(centred_R.square(), place_R, size_G, "sum") / divisor_G).sqrt()[place_R]
    # Not by deviation > 0: the rounding of the mean would give equal rewards an advantage of 1.
    return (centred_R / deviation_R).where((low_G < high_G)[place_R], 0.0)


def reward_weight(reward_R: Tensor, group_R: Tensor, *, beta: float) -> Tensor:
    """softmax(reward / beta) within each group times the group's size: >= 0, of mean 1 in each group.

    A small `beta` > 0 leaves the best rollouts of a prompt only, a large one weighs all alike.
    """
    if not beta > 0.0:
        raise ValueError(f"beta must be > 0, got {beta}")
    reward_R, place_R, size_G = _grouped(reward_R, group_R)
    best_R = _reduce(reward_R, place_R, size_G, "amax")[place_R]
    weight_R = ((reward_R - best_R) / beta).exp()
    return weight_R / _mean(weight_R, place_R, size_G)[place_R]


def paced_weight(reward_R: Tensor, group_R: Tensor, *, a: float = 1.0, b: float = 1.0) -> Tensor:
    """p^a (1 - p)^b, p the pass rate (mean reward) of the rollout's group, over the largest value that it can take.

    So it is 1 for the prompts at p = a / (a + b), on the edge of what the student can, and 0 for those that it always
    or never solves. Raises ValueError for a reward outside [0, 1] and unless a, b > 0. Source: PACED, arXiv 2603.11178,
    whose weight is without the largest value: at a = b = 1 a quarter of this one.
    """
    if not (a > 0.0 and b > 0.0):
        raise ValueError(f"a and b must be > 0, got {a} and {b}")
    reward_R, place_R, size_G = _grouped(reward_R, group_R)
    if not ((reward_R >= 0.0) & (reward_R <= 1.0)).all():
        raise ValueError("rewards must be in [0, 1]: their mean is a pass rate")
    pass_rate_R = _mean(reward_R, place_R, size_G)[place_R].clamp_max(1.0)
    best = a / (a + b)
    return (pass_rate_R / best) ** a * ((1.0 - pass_rate_R) / (1.0 - best)) ** b


def _grouped(reward_R: Tensor, group_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rewards in float32 or wider, the place 0 .. G-1 of each rollout's group, and the groups' sizes [G]."""
    if reward_R.ndim != 1 or reward_R.shape != group_R.shape:
        shapes = f"{tuple(reward_R.shape)} and {tuple(group_R.shape)}"
        raise ValueError(f"reward_R and group_R must both be [R], got {shapes}")
    _, place_R, size_G = group_R.unique(return_inverse=True, return_counts=True)
    return reward_R.to(torch.promote_types(reward_R.dtype, torch.float32)), place_R, size_G


def _mean(values_R: Tensor, place_R: Tensor, size_G: Tensor) -> Tensor:
    return _reduce(values_R, place_R, size_G, "sum") / size_G


def _reduce(values_R: Tensor, place_R: Tensor, size_G: Tensor, how: str) -> Tensor:
    return values_R.new_zeros(len(size_G)).scatter_reduce(0, place_R, values_R, how, include_self=False)
