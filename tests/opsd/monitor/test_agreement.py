"""A step's figures of both models: over all tokens and over those that are kept."""

from dataclasses import replace

import numpy as np
import pytest

from opsd.monitor.agreement import agreement_metrics
from opsd.ops import align
from opsd.ops.overlap import top_figures
from opsd.payload.scored import agreement_sums
from opsd.types import ScoredRollout, Vocabulary
from tests.opsd.builders import batch_of, make_scored, merge_stops, random_logprobs

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))
LENGTHS = [5, 1, 9]
KEPT = np.array([0, 3, 4, 5, 11])


def figures_of(items, kept=KEPT, **options):
    return agreement_metrics(agreement_sums(batch_of(items), kept, VOCABULARY), **{"whole_draws": True, **options})


@pytest.fixture
def items():
    """The teacher scores the candidates, so it knows of more than its own likeliest."""
    found = []
    for seed, length in enumerate(LENGTHS):
        student, teacher = (merge_stops(random_logprobs(length, 20, 2 * seed + i), VOCABULARY) for i in (0, 1))
        response = np.random.default_rng(seed).integers(1, 20, length).tolist()
        rollout, scores = make_scored(
            student, teacher, response, num_candidates=8, top_k=8, vocabulary=VOCABULARY, score_candidates=True
        )
        found.append(ScoredRollout(rollout=rollout, scores=scores))
    return found


def without_candidates(item):
    ids = np.full_like(item.rollout.candidate_ids, -1)
    logprobs = np.full_like(item.rollout.candidate_logprobs, -np.inf)
    return replace(item, rollout=replace(item.rollout, candidate_ids=ids, candidate_logprobs=logprobs))


def test_all_tokens_and_the_kept_ones_each_have_their_own(items, monkeypatch):
    [rows] = align.TokenRows.in_groups(items, VOCABULARY)
    each = top_figures(rows, VOCABULARY)
    monkeypatch.setattr(align, "GROUP_TOKENS", 6)  # in several groups
    found = figures_of(items)
    assert found["overlap_ratio"] == pytest.approx(each.overlap_T.mean())
    assert found["kept_overlap_ratio"] == pytest.approx(each.overlap_T[KEPT].mean())
    share = each.overlap_advantage_T.sum() / each.advantage_T.sum()
    kept_share = each.overlap_advantage_T[KEPT].sum() / each.advantage_T[KEPT].sum()
    assert found["overlap_token_advantage"] == pytest.approx(share)
    assert found["kept_overlap_token_advantage"] == pytest.approx(kept_share)
    assert found["coarse_kl_gap"] == pytest.approx(each.gap_T.mean())
    assert found["overlap_ratio"] != found["kept_overlap_ratio"] and share != kept_share


def test_answers_of_others_do_not_count(items):
    mixed = figures_of([*items[:2], without_candidates(items[2])])
    own = figures_of(items[:2], KEPT[:4])
    assert mixed == pytest.approx(own)
    assert figures_of([without_candidates(item) for item in items]) == dict.fromkeys(own)


def test_there_is_no_gap_where_tokens_are_not_drawn_from_the_whole_distribution(items):
    assert figures_of(items, whole_draws=False)["coarse_kl_gap"] is None
