"""Intervals of paired differences over seeds and the problems of each seed, one by one and for many arms at once."""
# A arms, S seeds, P problems of a seed, B resamples

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

NUM_RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    mean: float
    low: float
    high: float  # low to high: the percentile interval of this difference alone
    stands_out: bool  # its simultaneous interval, over all differences that were given together, leaves 0 out


def differences(values_ASP: np.ndarray) -> list[Difference]:
    """One for each arm: the mean over seeds and problems of an arm's value less the baseline's on the same problem.

    Seeds are drawn with replacement, and for each the problems with replacement, the same for all arms. A simultaneous
    interval is mean +- c times its own standard error, with the c that holds for all arms at once: the LEVEL quantile,
    over resamples, of the largest |mean of the resample - mean| / standard error of any arm. With few seeds all of
    these are too narrow rather than too wide.
    """
    num_arms, num_seeds, num_problems = values_ASP.shape
    resampled_AB = values_ASP.reshape(num_arms, -1) @ weights(num_seeds, num_problems).T
    mean_A = values_ASP.mean(axis=(1, 2))
    low_A, high_A = np.quantile(resampled_AB, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    error_A = resampled_AB.std(axis=1)
    safe_A = np.where(error_A > 0, error_A, np.inf)
    largest_B = (np.abs(resampled_AB - mean_A[:, None]) / safe_A[:, None]).max(axis=0)
    bound = np.quantile(largest_B, LEVEL)
    return [
        Difference(mean=float(mean), low=float(low), high=float(high), stands_out=bool(abs(mean) > bound * error))
        for mean, low, high, error in zip(mean_A, low_A, high_A, error_A, strict=True)
    ]


@lru_cache(maxsize=4)
def weights(num_seeds: int, num_problems: int) -> np.ndarray:
    """How much each problem of each seed counts in each resample: [B, S * P], each row sums to 1."""
    generator = np.random.default_rng(0)
    seed_BS = generator.integers(num_seeds, size=(NUM_RESAMPLES, num_seeds))
    even_P = np.full(num_problems, 1 / num_problems)
    weight_BSP = np.zeros((NUM_RESAMPLES, num_seeds, num_problems))
    for place in range(num_seeds):
        counts_BP = generator.multinomial(num_problems, even_P, size=NUM_RESAMPLES)
        weight_BSP[np.arange(NUM_RESAMPLES), seed_BS[:, place]] += counts_BP
    return weight_BSP.reshape(NUM_RESAMPLES, -1) / (num_seeds * num_problems)
