"""Overlap and what lies on it, counted by hand; the gap against every draw."""

from dataclasses import replace

import numpy as np
import pytest

from opsd.ops.align import TokenRows
from opsd.ops.overlap import top_figures
from opsd.types import ScoredRollout, Vocabulary
from tests.opsd.builders import make_scored, merge_stops, random_logprobs

VOCAB = 20
PLAIN = Vocabulary(size=VOCAB, stop_ids=(0,))
MERGED = Vocabulary(size=VOCAB, stop_ids=(3, 7))
EVERY_VOCABULARY = pytest.mark.parametrize("vocabulary", [PLAIN, MERGED], ids=["plain", "stops"])


def one_row(vocabulary, seed=0):
    """The same row once for each id: as if each were sampled there."""
    return (merge_stops(random_logprobs(1, VOCAB, seed + i), vocabulary).expand(VOCAB, -1) for i in (0, 1))


def rows_of(*made, vocabulary):
    [rows] = TokenRows.in_groups([ScoredRollout(rollout=r, scores=s) for r, s in made], vocabulary)
    return rows


def made(student, teacher, vocabulary, **known):
    return make_scored(student, teacher, list(range(VOCAB)), vocabulary=vocabulary, **known)


@EVERY_VOCABULARY
@pytest.mark.parametrize("score_candidates", [False, True])
@pytest.mark.parametrize(("num_candidates", "top_k"), [(6, 6), (8, 4), (3, 9)])
def test_overlap_and_its_advantage_are_those_of_the_likeliest(vocabulary, score_candidates, num_candidates, top_k):
    student, teacher = one_row(vocabulary)
    known = {"num_candidates": num_candidates, "top_k": top_k, "score_candidates": score_candidates}
    figures = top_figures(rows_of(made(student, teacher, vocabulary, **known), vocabulary=vocabulary), vocabulary)
    k = min(num_candidates, top_k)
    candidates = student[0].topk(num_candidates).indices.tolist()
    tops = teacher[0].topk(top_k).indices.tolist()
    overlap = set(candidates[:k]) & set(tops[:k])
    assert figures.known_T.all()
    np.testing.assert_allclose(figures.overlap_T, len(overlap) / k)
    advantage = {v: (student[0, v].exp() * (teacher[0, v] - student[0, v]).abs()).item() for v in range(VOCAB)}
    shared = candidates if score_candidates else [v for v in candidates if v in tops]
    np.testing.assert_allclose(figures.advantage_T, sum(advantage[v] for v in shared), rtol=1e-5)
    np.testing.assert_allclose(figures.overlap_advantage_T, sum(advantage[v] for v in overlap), rtol=1e-5, atol=1e-12)


@EVERY_VOCABULARY
@pytest.mark.parametrize("score_candidates", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_over_all_draws_the_gap_is_what_the_coarse_kl_lacks(vocabulary, score_candidates, seed):
    student, teacher = one_row(vocabulary, seed)
    known = {"num_candidates": 5, "top_k": 6, "score_candidates": score_candidates}
    figures = top_figures(rows_of(made(student, teacher, vocabulary, **known), vocabulary=vocabulary), vocabulary)
    shared = set(student[0].topk(5).indices.tolist())
    if not score_candidates:
        shared &= set(teacher[0].topk(6).indices.tolist())
    p, q = student[0].exp(), teacher[0].exp()
    outside = [v for v in range(VOCAB) if v not in shared and p[v] > 0]
    dense = (p[outside] * (p[outside] / q[outside]).log()).sum()
    coarse = p[outside].sum() * (p[outside].sum() / q[outside].sum()).log()
    expected = (dense - coarse).item()
    draws = student[0].exp().numpy()  # ids of a merged stop event have no mass of their own
    assert (draws * figures.gap_T).sum() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert expected > 1e-3


def test_of_equal_models_everything_overlaps_and_nothing_is_an_advantage():
    student, _ = one_row(MERGED)
    figures = top_figures(rows_of(made(student, student, MERGED, num_candidates=6, top_k=6), vocabulary=MERGED), MERGED)
    np.testing.assert_array_equal(figures.overlap_T, 1.0)
    np.testing.assert_allclose(figures.advantage_T, 0.0, atol=1e-6)
    np.testing.assert_allclose(figures.gap_T, 0.0, atol=1e-5)


def test_where_every_event_is_known_there_is_no_gap():
    """Also with more slots than there are events."""
    student, teacher = one_row(MERGED)
    known = {"num_candidates": VOCAB, "top_k": VOCAB, "score_candidates": True}
    figures = top_figures(rows_of(made(student, teacher, MERGED, **known), vocabulary=MERGED), MERGED)
    np.testing.assert_array_equal(figures.gap_T, 0.0)
    np.testing.assert_array_equal(figures.overlap_T, 1.0)
    np.testing.assert_array_equal(figures.overlap_advantage_T, figures.advantage_T)


def test_answers_without_candidates_are_not_known():
    student, teacher = one_row(PLAIN)
    sampled = made(student, teacher, PLAIN, num_candidates=5, top_k=6)
    rollout, scores = made(student, teacher, PLAIN, num_candidates=5, top_k=6)
    nothing = np.full_like(rollout.candidate_logprobs, -np.inf)
    given = replace(rollout, candidate_ids=np.full_like(rollout.candidate_ids, -1), candidate_logprobs=nothing)
    figures = top_figures(rows_of(sampled, (given, scores), vocabulary=PLAIN), PLAIN)
    assert figures.known_T.tolist() == [True] * VOCAB + [False] * VOCAB
    for values_T in (figures.overlap_T, figures.advantage_T, figures.overlap_advantage_T, figures.gap_T):
        assert np.isfinite(values_T).all() and not values_T[VOCAB:].any()
