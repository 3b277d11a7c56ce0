"""The entropy of a distribution of which only the likeliest events are known.

To count all others as one event would be wrong in the worst way: where the student is most unsure, nearly all of its
mass is unknown and such an entropy falls towards 0. Here the unknown events follow a power law instead.
"""
# T rows, C known events, R ranks beyond them, S exponents

from __future__ import annotations

from functools import lru_cache

import numpy as np

EXPONENTS_S = np.concatenate([np.linspace(0.0, 4.0, 81), np.geomspace(4.1, 64.0, 40)])


def entropy_from_top(top_logprobs_TC: np.ndarray, rest_logprob_T: np.ndarray, num_events: int) -> np.ndarray:
    """Entropy in nats, float64 [T], from the C likeliest of `num_events` events, likeliest first (-inf: an empty slot).

    The rest, of log-mass `rest_logprob_T`, is taken to fall off as p_r = p_C (r / C)^-s over the ranks r > C, with the
    exponent s that gives it its mass; exact for a uniform distribution, for a power law and where the rest is empty.
    """
    logprobs_TC = top_logprobs_TC.astype(np.float64)
    known_TC = np.isfinite(logprobs_TC)
    known_T = -np.where(known_TC, np.exp(logprobs_TC) * np.where(known_TC, logprobs_TC, 0.0), 0.0).sum(axis=1)
    last_T = np.where(known_TC, logprobs_TC, np.inf).min(axis=1)
    log_mass_S, log_fall_S = power_law_tails(logprobs_TC.shape[1], num_events)
    log_fall_T = np.interp(rest_logprob_T - last_T, log_mass_S, log_fall_S)
    return known_T + np.exp(rest_logprob_T.astype(np.float64)) * (log_fall_T - last_T)


@lru_cache(maxsize=8)
def power_law_tails(num_known: int, num_events: int) -> tuple[np.ndarray, np.ndarray]:
    """For a grid of exponents, by rising mass: log(tail's mass / p_C), and the tail's mean of log(p_C / p_r)."""
    log_rank_R = np.log(np.arange(num_known + 1, num_events + 1) / num_known)
    if len(log_rank_R) == 0:
        return np.zeros(1), np.zeros(1)
    log_mass, log_fall = [], []
    for exponent in EXPONENTS_S[::-1]:
        weight_R = np.exp(-exponent * log_rank_R)
        log_mass.append(np.log(weight_R.sum()))
        log_fall.append(exponent * (weight_R * log_rank_R).sum() / weight_R.sum())
    return np.array(log_mass), np.array(log_fall)
