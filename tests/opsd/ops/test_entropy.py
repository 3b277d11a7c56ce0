"""An entropy from the likeliest few events, against the whole distribution's."""

import numpy as np
import pytest

from opsd.ops.entropy import entropy_from_top

NUM_EVENTS = 5000


def entropies(probs_TV, num_known):
    """(from the likeliest events, true one, that of the known events and one bucket for the rest), nats."""
    probs_TV = -np.sort(-probs_TV, axis=1)
    known_TC, rest_T = probs_TV[:, :num_known], probs_TV[:, num_known:].sum(axis=1)
    true_T = -np.where(probs_TV > 0, probs_TV * np.log(np.maximum(probs_TV, 1e-300)), 0).sum(axis=1)
    buckets_TB = np.concatenate([known_TC, rest_T[:, None]], axis=1)
    with np.errstate(divide="ignore"):
        found_T = entropy_from_top(np.log(known_TC).astype(np.float32), np.log(rest_T), probs_TV.shape[1])
    return found_T, true_T, -(buckets_TB * np.log(np.maximum(buckets_TB, 1e-300))).sum(axis=1)


def power_law(exponent):
    weights = np.arange(1, NUM_EVENTS + 1) ** -float(exponent)
    return weights / weights.sum()


@pytest.mark.parametrize("num_known", [1, 16, 256])
def test_exact_for_power_laws_and_the_uniform_distribution(num_known):
    found, true, _ = entropies(np.stack([power_law(s) for s in (0.0, 0.5, 1.0, 1.7, 3.0)]), num_known)
    np.testing.assert_allclose(found, true, rtol=2e-3)


def test_ranks_unsure_rows_as_the_truth_does_where_one_rest_bucket_turns_them_round():
    """Softmax of normal logits, from nearly certain to nearly uniform: another shape than the one assumed."""
    rng = np.random.default_rng(0)
    logits_TV = rng.normal(size=(40, NUM_EVENTS)) * np.linspace(0.3, 6, 40)[:, None]
    probs_TV = np.exp(logits_TV - logits_TV.max(axis=1, keepdims=True))
    found, true, bucket = entropies(probs_TV / probs_TV.sum(axis=1, keepdims=True), 16)
    np.testing.assert_allclose(found, true, rtol=0.15, atol=0.1)
    assert np.corrcoef(found, true)[0, 1] > 0.99
    assert np.corrcoef(bucket, true)[0, 1] < 0


def test_exact_where_all_is_known_and_where_nothing_is_left():
    probs = np.array([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    for num_known in (3, 4):
        found, true, _ = entropies(probs, num_known)
        np.testing.assert_allclose(found, true, atol=1e-6)
