"""How long answers are: drawn from a distribution, or from the answers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

TAIL = 0.99  # of the answers are shorter than the tail's length


def log_normal(
    shape: tuple[int, int], *, median: float, tail: float, longest: int, generator: np.random.Generator
) -> np.ndarray:
    """int64 response tokens: log-normal with this median and 99 % below `tail`, cut at `longest`."""
    sigma = np.log(tail / median) / NormalDist().inv_cdf(TAIL)
    drawn = generator.lognormal(np.log(median), sigma, shape)
    return np.clip(np.rint(drawn), 1, longest).astype(np.int64)


def of_answers(shape: tuple[int, int], lengths: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    """int64 response tokens, drawn with replacement from `lengths`."""
    return generator.choice(np.asarray(lengths, np.int64), shape)
