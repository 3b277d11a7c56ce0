"""Kept rows are the same whoever keeps the payload, in however many parts; and what travels is small."""

import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from opsd.batch import PendingScores, scored_batch
from opsd.errors import StageError
from opsd.learner.dealing import deal, kept_in, rows_for
from opsd.learner.packing import micro_batches, pack
from opsd.ops.losses.objective import PACKED_INPUTS, ROLLOUT_LOGPROB
from opsd.payload.keeper import in_one, looked_through
from opsd.payload.kept import Wanted, joined, kept_rows
from opsd.payload.scored import agreement_sums
from opsd.types import Mixture, NoScores, Selection, Vocabulary
from tests.opsd.builders import Answers, batch_of, kept_here, scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))
LENGTHS = [5, 1, 9, 4, 7, 3]
PLACES = ((4, 1), (0, 5), (3, 2))  # of each part's rollouts, in the order in which they came
KEPT = np.array([0, 4, 5, 8, 9, 14, 15, 20, 25, 26])


def in_parts(items):
    """A step's batch whose payload is in three places."""
    groups = []
    for places in PLACES:
        rollouts = [items[place].rollout for place in places]
        parts = kept_here(rollouts, [items[place].scores for place in places], VOCABULARY)
        groups.append(
            PendingScores(
                rollouts=dict(zip(places, rollouts, strict=True)),
                scored_places=places,
                parts=parts,
                engines=Answers(),
                teacher="t",
            )
        )
    return scored_batch(groups)


def with_mixture(item):
    other_ids = np.full(len(item.rollout.prompt.token_ids) + len(item.rollout), 7, np.int32)
    return replace(item, rollout=replace(item.rollout, mixture=Mixture(other_ids=other_ids, own_share=0.25)))


def with_hidden(item):
    hidden = np.random.default_rng(len(item.rollout)).normal(size=(len(item.rollout), 3)).astype(np.float32)
    return replace(item, scores=replace(item.scores, hidden=hidden))


def with_fewer_candidates(item):
    rollout = item.rollout
    few = {name: getattr(rollout, name)[:, :2] for name in ("candidate_ids", "candidate_logprobs")}
    return replace(item, rollout=replace(rollout, **few))


@pytest.mark.parametrize("num_ranks", [1, 2, 7])  # seven: one without a sequence
@pytest.mark.parametrize("max_tokens", [1, 14, 1000])
def test_every_rank_gets_the_micro_batches_of_a_batch_in_one_place(num_ranks, max_tokens):
    items = scored_rollouts(LENGTHS, VOCABULARY)
    items[2], items[4] = with_hidden(with_mixture(items[2])), with_hidden(with_fewer_candidates(items[4]))
    items = [item if item.scores.hidden is not None else with_hidden(item) for item in items]
    selection = Selection(
        index_N=torch.from_numpy(KEPT),
        weight_N=1.0 + torch.arange(10.0),
        temperature_N=1.0 + torch.arange(10.0),
        inputs={"advantage_N": torch.arange(10.0)},
    )
    size = {"num_ranks": num_ranks, "max_tokens": max_tokens}
    expected = pack(batch_of(items), selection, "teacher", VOCABULARY, **size, with_hidden=True)
    batch = in_parts(items)
    wanted = Wanted(support="teacher", num_candidates=batch.num_candidates, with_hidden=True)
    shares = deal(batch.rollouts, selection, payload_R=batch.payload_R, first_R=batch.first_R, **size)
    rows = rows_for(shares, batch.payloads, wanted)
    found = [micro_batches(share.work, own) for share, own in zip(shares, rows, strict=True)]
    assert [len(own) for own in found] == [len(own) for own in expected]
    for one, other in zip((b for own in found for b in own), (b for own in expected for b in own), strict=True):
        for each in fields(one):
            assert_same(getattr(one, each.name), getattr(other, each.name), each.name)


def assert_same(one, other, name):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key], key)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    else:
        assert one == other, name


def test_a_loss_of_draws_has_its_inputs_from_every_part():
    scored = batch_of(scored_rollouts(LENGTHS, VOCABULARY))
    wanted = Wanted(support="teacher", num_candidates=8, asked=frozenset(PACKED_INPUTS))
    whole = kept_rows(scored, KEPT, wanted, VOCABULARY)
    parts = [kept_rows(scored, KEPT[:4], wanted, VOCABULARY), kept_rows(scored, KEPT[4:], wanted, VOCABULARY)]
    assert whole.inputs.keys() == {"outside_N", "teacher_tail_N", "rollout_logprob_N"}
    for name, values in joined(parts).inputs.items():
        np.testing.assert_array_equal(values, whole.inputs[name])


def test_agreement_is_the_sum_over_the_parts():
    items = scored_rollouts(LENGTHS, VOCABULARY)
    batch, together = in_parts(items), agreement_sums(batch_of(items), KEPT, VOCABULARY)
    selection = Selection(index_N=torch.from_numpy(KEPT), weight_N=torch.ones(len(KEPT)))
    where = {"payload_R": batch.payload_R, "first_R": batch.first_R}
    shares = deal(batch.rollouts, selection, **where, num_ranks=2, max_tokens=20)
    sums = [payload.close(kept_in(shares, number))() for number, payload in enumerate(batch.payloads)]
    assert {name: sum(own[name] for own in sums) for name in together} == pytest.approx(together)
    assert 0 < together["kept_overlap"] < together["overlap"]


def test_what_travels_is_in_buffers_that_a_pickle_leaves_alone():
    """The arrays go beside the pickle, which is as long for many tokens as for few."""
    sizes = []
    for length in (20, 200):
        rollout_batch = batch_of(scored_rollouts([length], VOCABULARY))
        wanted = Wanted(support="teacher", num_candidates=8, asked=frozenset(PACKED_INPUTS))
        rows = kept_rows(rollout_batch, np.arange(length), wanted, VOCABULARY)
        [(_, part, _)] = kept_here(rollout_batch.rollouts, [rollout_batch.items[0].scores], VOCABULARY)
        buffers: list = []
        sizes.append(len(pickle.dumps((rows, part), protocol=5, buffer_callback=buffers.append)))
        assert sum(buffer.raw().nbytes for buffer in buffers) > 50 * length
    assert abs(sizes[1] - sizes[0]) < 100


def test_the_driver_is_told_at_most_40_bytes_of_a_token():
    batch = batch_of(scored_rollouts(LENGTHS, VOCABULARY))
    [(_, part, _)] = kept_here(batch.rollouts, [item.scores for item in batch.items], VOCABULARY)
    assert {values.shape for values in part.stats.values()} == {(sum(LENGTHS),)}
    assert sum(values.nbytes for values in part.stats.values()) <= 40 * sum(LENGTHS)


def test_parts_in_one_are_as_if_they_had_come_together():
    items = scored_rollouts(LENGTHS, VOCABULARY)
    scores = [item.scores for item in items]
    scores[1] = NoScores(reason="teacher_error")
    scores[3] = replace(scores[3], sampled_logprobs=np.full(4, np.nan, np.float32))
    found = [looked_through("t", [i.rollout for i in items], scores, VOCABULARY)]
    for numbers in ([0], [1], [2, 3, 4], [5]):
        rollouts = [items[n].rollout for n in numbers]
        found.append(looked_through("t", rollouts, [scores[n] for n in numbers], VOCABULARY))
    (whole, scored), (part, joint) = found[0], in_one(found[1:])
    assert (part.num_rollouts, part.missing, part.num_same_first) == (6, whole.missing, whole.num_same_first)
    assert list(part.missing) == [1, 3] and part.num_candidates == whole.num_candidates
    assert joint.rollouts == scored.rollouts
    for name, values_T in whole.stats.items():
        np.testing.assert_array_equal(part.stats[name], values_T)


def test_scores_of_other_tokens_are_refused_where_they_are_kept():
    first, second = scored_rollouts([4, 4], VOCABULARY)
    with pytest.raises(StageError, match="score: the teacher t gives token"):
        kept_here([first.rollout, second.rollout], [second.scores, first.scores], VOCABULARY)


def test_the_weights_that_drew_a_token_change_nothing_in_what_is_kept_of_it():
    def aged(item):
        versions = np.arange(3, 3 + len(item.rollout), dtype=np.int32)
        return replace(item, rollout=replace(item.rollout, policy_version=3, token_versions=versions))

    wanted = Wanted(support="teacher", num_candidates=8, asked=frozenset({ROLLOUT_LOGPROB}))
    items = scored_rollouts(LENGTHS, VOCABULARY)
    plain, mixed = (kept_rows(batch_of(each), KEPT, wanted, VOCABULARY) for each in (items, [aged(i) for i in items]))
    for each in fields(plain):
        np.testing.assert_equal(getattr(mixed, each.name), getattr(plain, each.name))
