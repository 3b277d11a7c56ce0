"""What the scores say of a token, against the dense distributions that they were cut from."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from opsd.ops.align import TokenRows, lookup, predicting_rows, sampled_outside, support_buckets, token_stats
from opsd.ops.losses.divergences import DIVERGENCES
from opsd.ops.row_function import RowFunction
from opsd.ops.signals import STATISTICS
from opsd.types import ScoredRollout, Vocabulary
from tests.opsd.builders import make_scored, merge_stops, random_logprobs

VOCAB = 20
RESPONSE = [4, 7, 7, 19, 0, 3]
PLAIN = Vocabulary(size=VOCAB, stop_ids=(0,))
MERGED = Vocabulary(size=VOCAB, stop_ids=(3, 7))


def distributions(vocabulary):
    return tuple(merge_stops(random_logprobs(len(RESPONSE), VOCAB, seed), vocabulary) for seed in (0, 1))


def rows_of(*made, vocabulary):
    scored = [ScoredRollout(rollout=rollout, scores=scores) for rollout, scores in made]
    [rows] = TokenRows.in_groups(scored, vocabulary)
    return rows


def dense_kl(of_TV, against_TV):
    return torch.where(of_TV.isneginf(), 0.0, of_TV.exp() * (of_TV - against_TV.nan_to_num(neginf=0.0))).sum(-1)


def test_row_before_the_first_response_token_predicts_it():
    assert predicting_rows(5, np.array([0, 1, 4])).tolist() == [4, 5, 8]


def test_lookup_is_per_row_and_never_finds_an_empty_slot():
    ids = np.array([[5, -1, 2], [2, 9, -1]])
    logprobs = np.array([[-0.5, -np.inf, -0.2], [-0.7, -0.9, -np.inf]], np.float32)
    found_logprobs, found = lookup(np.array([[2, 9, -1], [2, 9, 5]]), ids, logprobs)
    assert found.tolist() == [[True, False, False], [True, True, False]]
    assert found_logprobs[found].tolist() == pytest.approx([-0.2, -0.7, -0.9])
    assert np.isneginf(found_logprobs[~found]).all()


@pytest.mark.parametrize("vocabulary", [PLAIN, MERGED])
@pytest.mark.parametrize("score_candidates", [False, True])
def test_stats_equal_the_dense_ones_where_every_event_is_named(vocabulary, score_candidates):
    student, teacher = distributions(vocabulary)
    rollout, scores = make_scored(
        student, teacher, RESPONSE, num_candidates=VOCAB, top_k=VOCAB, vocabulary=vocabulary,
        score_candidates=score_candidates,
    )  # fmt: skip
    stats = token_stats(rows_of((rollout, scores), vocabulary=vocabulary), vocabulary, STATISTICS)
    torch.testing.assert_close(stats.reverse_kl_T.double(), dense_kl(student, teacher), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.forward_kl_T.double(), dense_kl(teacher, student), rtol=1e-5, atol=1e-6)
    entropy = -(student.exp() * student.nan_to_num(neginf=0.0)).sum(-1) / math.log(VOCAB)
    torch.testing.assert_close(stats.entropy_T.double(), entropy, rtol=1e-5, atol=1e-6)
    entropy = -(teacher.exp() * teacher.nan_to_num(neginf=0.0)).sum(-1) / math.log(VOCAB)
    torch.testing.assert_close(stats.teacher_entropy_T.double(), entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.named_mass_T, torch.ones(len(RESPONSE)))
    p, q = student.exp(), teacher.exp()
    distance = (1 - (p * q).sqrt().sum(-1)).sqrt()
    torch.testing.assert_close(stats.extra["hellinger_T"].double(), distance, rtol=1e-5, atol=1e-6)
    ratio = torch.where(p > 0, student - teacher.nan_to_num(neginf=0.0), 0.0)
    gradient = p * (ratio - (p * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(stats.extra["grad_norm_T"].double(), gradient.norm(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [PLAIN, MERGED])
def test_the_sampled_events_log_probabilities_are_in_the_stats(vocabulary):
    student, teacher = distributions(vocabulary)
    rollout, scores = make_scored(student, teacher, RESPONSE, num_candidates=2, top_k=2, vocabulary=vocabulary)
    stats = token_stats(rows_of((rollout, scores), vocabulary=vocabulary), vocabulary)
    for t, token in enumerate(RESPONSE):
        event = vocabulary.stop_event if token in vocabulary.stop_ids else token
        assert stats.student_logprob_T[t].item() == pytest.approx(student[t, event].item())
        assert stats.teacher_logprob_T[t].item() == pytest.approx(teacher[t, event].item())


@pytest.mark.parametrize("vocabulary", [PLAIN, MERGED])
@pytest.mark.parametrize("num_candidates", [3, 16, 18])
@pytest.mark.parametrize("score_candidates", [False, True])
def test_compatibility_is_the_teachers_mass_on_the_students_likeliest(vocabulary, num_candidates, score_candidates):
    """On sixteen of them at most. A teacher of top 4 knows of these and of the sampled event alone."""
    student, teacher = distributions(vocabulary)
    rollout, scores = make_scored(
        student, teacher, RESPONSE, num_candidates=num_candidates, top_k=4, vocabulary=vocabulary,
        score_candidates=score_candidates,
    )  # fmt: skip
    found = token_stats(rows_of((rollout, scores), vocabulary=vocabulary), vocabulary).compatibility_T
    for t, token in enumerate(RESPONSE):
        likeliest = set(student[t].topk(min(num_candidates, 16)).indices.tolist())
        if not score_candidates:
            event = vocabulary.stop_event if token in vocabulary.stop_ids else token
            likeliest &= {event, *teacher[t].topk(4).indices.tolist()}
        assert found[t].item() == pytest.approx(teacher[t, sorted(likeliest)].exp().sum().item(), abs=1e-6)


@pytest.mark.parametrize("vocabulary", [PLAIN, MERGED])
@pytest.mark.parametrize("score_candidates", [False, True])
def test_named_mass_is_the_students_on_the_tokens_that_the_two_models_are_compared_on(vocabulary, score_candidates):
    student, teacher = distributions(vocabulary)
    rollout, scores = make_scored(
        student, teacher, RESPONSE, num_candidates=6, top_k=4, vocabulary=vocabulary, score_candidates=score_candidates,
    )  # fmt: skip
    stats = token_stats(rows_of((rollout, scores), vocabulary=vocabulary), vocabulary)
    for t, token in enumerate(RESPONSE):
        event = vocabulary.stop_event if token in vocabulary.stop_ids else token
        known = set(student[t].topk(6).indices.tolist())
        if not score_candidates:
            known &= set(teacher[t].topk(4).indices.tolist())
        mass = student[t, sorted(known | {event})].exp().sum().item()
        assert stats.named_mass_T[t].item() == pytest.approx(mass, abs=1e-6)


def test_a_far_student_has_little_mass_on_what_a_teacher_of_top_k_names():
    """So that its divergence is nearly blind there, and says so; a teacher that scores the candidates is not."""
    student, teacher = distributions(PLAIN)
    far = (-teacher).log_softmax(-1)  # likely is what the teacher finds unlikely
    mass, share = {}, {}
    for score_candidates in (False, True):
        rollout, scores = make_scored(
            far, teacher, RESPONSE, num_candidates=8, top_k=4, vocabulary=PLAIN, score_candidates=score_candidates
        )
        stats = token_stats(rows_of((rollout, scores), vocabulary=PLAIN), PLAIN)
        mass[score_candidates] = stats.named_mass_T.mean().item()
        share[score_candidates] = (stats.reverse_kl_T.sum() / dense_kl(far, teacher).sum()).item()
    assert mass[False] < 0.5 and share[False] < 0.5
    assert mass[True] > 0.9 and share[True] > 0.9


def test_stats_of_read_only_arrays_come_without_a_warning(recwarn):
    """As they come from Ray's object store."""
    student, teacher = distributions(PLAIN)
    rollout, scores = make_scored(student, teacher, RESPONSE, num_candidates=5, top_k=5, vocabulary=PLAIN)
    for array in (*vars(rollout).values(), *vars(scores).values()):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    token_stats(rows_of((rollout, scores), vocabulary=PLAIN), PLAIN)
    assert not recwarn.list


@pytest.mark.parametrize("score_candidates", [False, True])
def test_stats_are_lower_bounds_that_tighten_with_what_is_known(score_candidates):
    student, teacher = distributions(PLAIN)
    exact = dense_kl(student, teacher)
    earlier = torch.zeros_like(exact)
    for known in (2, 5, 10, VOCAB):
        rollout, scores = make_scored(
            student, teacher, RESPONSE, num_candidates=known, top_k=known, vocabulary=PLAIN,
            score_candidates=score_candidates,
        )  # fmt: skip
        value = token_stats(rows_of((rollout, scores), vocabulary=PLAIN), PLAIN).reverse_kl_T.double()
        assert (value <= exact + 1e-5).all()
        assert (value >= 0).all()
        assert value.sum() >= earlier.sum() - 1e-6
        earlier = value


def test_equal_models_have_zero_divergence():
    student, _ = distributions(MERGED)
    rollout, scores = make_scored(student, student, RESPONSE, num_candidates=6, top_k=9, vocabulary=MERGED)
    stats = token_stats(rows_of((rollout, scores), vocabulary=MERGED), MERGED)
    assert stats.reverse_kl_T.abs().max() < 1e-6
    assert stats.forward_kl_T.abs().max() < 1e-6


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
@pytest.mark.parametrize("vocabulary", [PLAIN, MERGED])
def test_support_names_each_event_once_and_keeps_the_teachers_mass(support, vocabulary):
    student, teacher = distributions(vocabulary)
    rollout, scores = make_scored(
        student, teacher, RESPONSE, num_candidates=5, top_k=7, vocabulary=vocabulary, score_candidates=True
    )
    ids, logprobs = support_buckets(rows_of((rollout, scores), vocabulary=vocabulary), support, vocabulary)
    wanted = {"teacher": scores.top_ids, "student": rollout.candidate_ids}
    for row, (row_ids, row_logprobs) in enumerate(zip(ids, logprobs, strict=True)):
        named = row_ids[row_ids >= 0].tolist()
        assert len(named) == len(set(named))
        assert row_ids[0] == (vocabulary.stop_event if RESPONSE[row] in vocabulary.stop_ids else RESPONSE[row])
        sides = ("teacher", "student") if support == "union" else (support,)
        assert set(named) == {row_ids[0]}.union(*(set(wanted[side][row].tolist()) for side in sides))
        np.testing.assert_allclose(row_logprobs[:-1][row_ids >= 0], teacher[row, named].numpy(), rtol=1e-5)
        np.testing.assert_allclose(np.exp(row_logprobs.astype(np.float64)).sum(), 1.0, atol=2e-6)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("vocabulary", [PLAIN, MERGED])
def test_a_support_of_every_event_has_an_empty_rest(name, vocabulary):
    student, teacher = distributions(vocabulary)
    rollout, scores = make_scored(
        student, teacher, RESPONSE, num_candidates=4, top_k=VOCAB, vocabulary=vocabulary, score_candidates=True
    )
    ids, teacher_logprobs = support_buckets(rows_of((rollout, scores), vocabulary=vocabulary), "teacher", vocabulary)
    assert np.isneginf(teacher_logprobs[:, -1]).all()
    at_ids = student.gather(1, torch.from_numpy(ids).clamp_min(0)).masked_fill(torch.from_numpy(ids) < 0, -torch.inf)
    student_logprobs = torch.cat([at_ids, torch.full((len(ids), 1), -torch.inf, dtype=torch.float64)], 1)
    value = DIVERGENCES[name](student_logprobs, torch.from_numpy(teacher_logprobs).double())
    assert torch.isfinite(value).all()
    if name == "reverse_kl":
        torch.testing.assert_close(value, dense_kl(student, teacher), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
@pytest.mark.parametrize("vocabulary", [PLAIN, MERGED])
def test_a_sampled_event_is_outside_of_lists_that_do_not_depend_on_it(support, vocabulary):
    """Each event in turn is the sampled one of the same row: the lists and the teacher's tail stay the same."""
    student, teacher = (own[:1].expand(VOCAB, -1) for own in distributions(vocabulary))
    rollout, scores = make_scored(
        student, teacher, list(range(VOCAB)), num_candidates=5, top_k=7, vocabulary=vocabulary, score_candidates=True
    )
    rows = rows_of((rollout, scores), vocabulary=vocabulary)
    outside, tail = sampled_outside(rows, support, vocabulary)
    lists = {"teacher": scores.top_ids[0], "student": rollout.candidate_ids[0]}
    lists["union"] = np.concatenate(list(lists.values()))
    named = sorted(set(lists[support].tolist()))
    assert outside.tolist() == [event not in named for event in rows.events_T]
    assert 0 < outside.sum() < VOCAB
    expected = math.log(1.0 - teacher[0, named].exp().sum().item())
    np.testing.assert_allclose(tail, np.full(VOCAB, expected, np.float32), rtol=1e-5)


def test_a_support_of_every_event_has_no_tail():
    student, teacher = distributions(MERGED)
    made = make_scored(student, teacher, RESPONSE, num_candidates=2, top_k=VOCAB, vocabulary=MERGED)
    outside, tail = sampled_outside(rows_of(made, vocabulary=MERGED), "teacher", MERGED)
    assert not outside.any() and np.isneginf(tail).all()


def test_rollouts_side_by_side_have_the_stats_and_buckets_that_each_has_alone():
    """Also where one came without candidates, and where one of two teachers was asked for the candidates."""
    student, teacher = distributions(MERGED)
    known = {"num_candidates": 5, "top_k": 6, "vocabulary": MERGED}
    first = make_scored(student, teacher, RESPONSE, **known)
    second = make_scored(student[:3], teacher[:3], RESPONSE[:3], score_candidates=True, **known)
    bare = make_scored(student[:2], teacher[:2], RESPONSE[:2], **{**known, "num_candidates": 1})
    made = [first, second, bare]
    together = rows_of(*made, vocabulary=MERGED)
    alone = [rows_of(one, vocabulary=MERGED) for one in made]
    stats = token_stats(together, MERGED, STATISTICS).known()
    own = [token_stats(rows, MERGED, STATISTICS).known() for rows in alone]
    for name in ("reverse_kl_T", "forward_kl_T", "hellinger_T", "compatibility_T", "teacher_logprob_T"):
        torch.testing.assert_close(stats[name], torch.cat([part[name] for part in own]), rtol=1e-6, atol=1e-7)
    whole = len(RESPONSE) + 3  # a power law through one candidate is not the one through five
    torch.testing.assert_close(stats["entropy_T"][:whole], torch.cat([part["entropy_T"] for part in own])[:whole])
    buckets = zip(*(support_buckets(rows, "teacher", MERGED) for rows in alone), strict=True)
    for found, expected in zip(support_buckets(together, "teacher", MERGED), buckets, strict=True):
        np.testing.assert_array_equal(found, np.concatenate(expected))


def teacher_best(student_NB, teacher_NB):
    return teacher_NB[:, :-1].amax(1)


def student_best_id(student_NB, teacher_NB, *, support_NU):
    return support_NU.gather(1, student_NB[:, :-1].argmax(1, keepdim=True))[:, 0].double()


def test_a_statistic_of_ones_own_sees_the_buckets_and_their_token_ids():
    student, teacher = distributions(PLAIN)
    made = make_scored(student, teacher, RESPONSE, num_candidates=VOCAB, top_k=VOCAB, vocabulary=PLAIN)
    statistics = {"best_T": teacher_best, "id_T": RowFunction(student_best_id, inputs=("support_NU",))}
    extra = token_stats(rows_of(made, vocabulary=PLAIN), PLAIN, statistics).extra
    torch.testing.assert_close(extra["best_T"], teacher.amax(1).float(), rtol=1e-5, atol=1e-6)
    assert extra["id_T"].tolist() == student.argmax(1).tolist()
    assert token_stats(rows_of(made, vocabulary=PLAIN), PLAIN).extra == {}  # nothing that was not asked for


def test_a_union_support_of_rollouts_with_and_without_candidates():
    """As answers of a file beside the student's: as wide as the widest, the file's slots empty."""
    student, teacher = distributions(PLAIN)
    known = {"top_k": 6, "vocabulary": PLAIN, "score_candidates": True}
    sampled = make_scored(student, teacher, RESPONSE, num_candidates=5, **known)
    rollout, scores = make_scored(student, teacher, RESPONSE, num_candidates=1, **known)
    nothing = np.full_like(rollout.candidate_logprobs, -np.inf)
    bare = (
        replace(rollout, candidate_ids=np.full_like(rollout.candidate_ids, -1), candidate_logprobs=nothing),
        replace(scores, candidate_logprobs=nothing),
    )
    ids, logprobs = support_buckets(rows_of(sampled, bare, vocabulary=PLAIN), "union", PLAIN)
    own_ids, own_logprobs = support_buckets(rows_of(sampled, vocabulary=PLAIN), "union", PLAIN)
    np.testing.assert_array_equal(ids[: len(RESPONSE)], own_ids)
    np.testing.assert_array_equal(logprobs[: len(RESPONSE)], own_logprobs)
    teacher_ids, teacher_logprobs = support_buckets(rows_of(bare, vocabulary=PLAIN), "teacher", PLAIN)
    width = teacher_ids.shape[1]
    np.testing.assert_array_equal(ids[len(RESPONSE) :, :width], teacher_ids)
    assert (ids[len(RESPONSE) :, width:] == -1).all()
    np.testing.assert_array_equal(logprobs[len(RESPONSE) :, -1], teacher_logprobs[:, -1])
