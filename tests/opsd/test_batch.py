"""Rollouts that cannot be trained on are dropped and counted; the others keep their own scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opsd.batch import PendingScores, batch_stats, scored_batch
from opsd.errors import StageError
from opsd.payload.scored import rollout_stats
from opsd.types import NoScores, Vocabulary
from tests.opsd.builders import Answers, batch_of, kept_here, scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))


def pending(rollouts, scores, *, places=None, teacher="/models/t"):
    """One group, by place; a rollout whose scores are None was not given to the teacher."""
    places = list(range(len(rollouts))) if places is None else places
    asked = [number for number, found in enumerate(scores) if found is not None]
    own_rollouts, own_scores = [rollouts[n] for n in asked], [scores[n] for n in asked]
    return PendingScores(
        rollouts=dict(zip(places, rollouts, strict=True)),
        scored_places=tuple(places[n] for n in asked),
        parts=kept_here(own_rollouts, own_scores, VOCABULARY, teacher),
        engines=Answers(),
        teacher=teacher,
    )


def scores_of(batch):
    """The scores of each rollout, from wherever they are kept."""
    found = []
    for number, rollout in enumerate(batch.rollouts):
        kept = batch.payloads[batch.payload_R[number]].whole()
        item = kept.items[kept.bounds.tolist().index(batch.first_R[number])]
        assert item.rollout is rollout
        found.append(item.scores)
    return found


def with_nan(scores):
    broken = scores.top_logprobs.copy()
    broken[0, 1] = np.nan
    return replace(scores, top_logprobs=broken)


def test_unusable_rollouts_are_dropped_and_counted():
    items = scored_rollouts([5, 3, 4, 2], VOCABULARY)
    items = [*items, *scored_rollouts([6], VOCABULARY)]
    scores = [item.scores for item in items]
    scores[1] = with_nan(scores[1])
    scores[3] = None  # a padded token: the teacher was not asked
    scores[4] = NoScores(reason="teacher_error", said="out of memory")
    scored = scored_batch([pending([item.rollout for item in items], scores)])
    assert scored.rollouts == (items[0].rollout, items[2].rollout)
    assert scores_of(scored) == [items[0].scores, items[2].scores]
    assert scored.dropped == {"nan_score": 1, "foreign_token": 1, "teacher_error": 1}
    assert (scored.num_generated, scored.num_scored, scored.num_tokens) == (5 + 3 + 4 + 2 + 6, 5 + 3 + 4, 5 + 4)
    assert scored.bounds.tolist() == [0, 5, 9]
    batch = batch_stats(7, scored, scored.tokens, None, num_steps=10)
    assert (batch.step, batch.lengths) == (7, (5, 4))
    alone = rollout_stats(batch_of([items[2]]), VOCABULARY)
    assert torch.equal(batch.tokens.reverse_kl_T[5:], alone.reverse_kl_T)


def test_nothing_but_nan_stops_the_run():
    items = scored_rollouts([5, 3], VOCABULARY)
    with pytest.raises(StageError, match="none of 2 rollouts can be used: .* 2 have NaN in the teacher's scores"):
        scored_batch([pending([item.rollout for item in items], [with_nan(item.scores) for item in items])])


def test_rollouts_are_in_the_order_of_their_places_whichever_group_came_first():
    items = scored_rollouts([5, 3, 4, 2], VOCABULARY)
    groups = [
        pending([items[place].rollout for place in places], [items[place].scores for place in places], places=places)
        for places in ((3, 1), (2, 0))
    ]
    batch = scored_batch(groups)
    assert batch.rollouts == tuple(item.rollout for item in items)
    assert scores_of(batch) == [item.scores for item in items]
    together = rollout_stats(batch_of(items), VOCABULARY)
    for name, value_T in together.known().items():
        assert torch.equal(batch.tokens.known()[name], value_T), name


def test_scores_of_other_tokens_than_asked_stop_the_step_with_the_teacher_s_name():
    """Of two teachers, the one whose answers to two requests were swapped."""
    items = scored_rollouts([4, 4, 5], VOCABULARY)
    swapped = [
        replace(items[place].scores, sampled_logprobs=items[1 - place].scores.sampled_logprobs) for place in (0, 1)
    ]
    right = pending([items[2].rollout], [items[2].scores], places=[2], teacher="/models/other")
    with pytest.raises(StageError, match="score: the teacher /models/t gives token"):
        pending([item.rollout for item in items[:2]], swapped)
    both = [pending([i.rollout for i in items[:2]], [i.scores for i in items[:2]]), right]
    assert len(scored_batch(both).rollouts) == 3


def test_a_teacher_is_refused_where_no_part_of_the_step_prefers_a_token():
    """One whose few tokens are all alike may be chance."""
    first, second = scored_rollouts([2, 3], VOCABULARY, top_k=4)
    alike = np.full_like(first.scores.top_logprobs, -3.0)
    flat = replace(
        first.scores,
        top_logprobs=alike,
        top_ids=np.tile(np.arange(1, 5, dtype=np.int32), (2, 1)),
        sampled_logprobs=np.full(2, -3.0, np.float32),
    )
    parts = [pending([first.rollout], [flat]), pending([second.rollout], [second.scores], places=[1])]
    assert len(scored_batch(parts).rollouts) == 2
    with pytest.raises(StageError, match="the teacher /models/t gives every token the same log-probability, -3;"):
        scored_batch(parts[:1])


def test_where_nothing_is_left_the_teachers_words_are_repeated():
    [item] = scored_rollouts([5], VOCABULARY)
    with pytest.raises(StageError, match="none of 1 rollouts .* 1 it failed on; the teacher said: out of memory$"):
        scored_batch([pending([item.rollout], [NoScores(reason="teacher_error", said="out of memory")])])
