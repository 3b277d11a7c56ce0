"""Rollouts that cannot be trained on are dropped and counted; the others keep their own scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opsd.batch import PendingScores, batch_stats, rollout_stats, scored_batch
from opsd.errors import StageError
from opsd.types import NoScores, Vocabulary
from tests.opsd.builders import batch_of, scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))


class Answers:
    """An engine whose answers are there: its parts are what it returns."""

    def are_scored(self, parts):
        return True

    def scores(self, parts):
        return parts


def pending(rollouts, scores):
    """One group, by place; a rollout whose scores are None was not given to the teacher."""
    places = tuple(place for place, found in enumerate(scores) if found is not None)
    parts = [scores[place] for place in places]
    return PendingScores(
        rollouts=dict(enumerate(rollouts)),
        scored_places=places,
        parts=parts,
        engines=Answers(),
        teacher="/models/t",
        vocabulary=VOCABULARY,
    )


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
    assert scored.rollouts == [items[0].rollout, items[2].rollout]
    assert [item.scores for item in scored.items] == [items[0].scores, items[2].scores]
    assert scored.dropped == {"nan_score": 1, "foreign_token": 1, "teacher_error": 1}
    assert (scored.num_generated, scored.num_scored, scored.num_tokens) == (5 + 3 + 4 + 2 + 6, 5 + 3 + 4, 5 + 4)
    assert scored.bounds.tolist() == [0, 5, 9]
    batch = batch_stats(7, scored, rollout_stats(scored, VOCABULARY), None, num_steps=10)
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
        PendingScores(
            rollouts={place: items[place].rollout for place in places},
            scored_places=places,
            parts=[items[place].scores for place in places],
            engines=Answers(),
            teacher="/models/t",
            vocabulary=VOCABULARY,
        )
        for places in ((3, 1), (2, 0))
    ]
    assert scored_batch(groups).items == tuple(items)


def test_scores_of_other_tokens_than_asked_stop_the_step_with_the_teacher_s_name():
    """Of two teachers, the one whose answers to two requests were swapped."""
    items = scored_rollouts([4, 4, 5], VOCABULARY)
    swapped = [
        replace(items[place].scores, sampled_logprobs=items[1 - place].scores.sampled_logprobs) for place in (0, 1)
    ]
    right = replace(pending([items[2].rollout], [items[2].scores]), teacher="/models/other")
    right = replace(right, rollouts={2: items[2].rollout}, scored_places=(2,))
    wrong = pending([item.rollout for item in items[:2]], swapped)
    with pytest.raises(StageError, match="score: the teacher /models/t gives token"):
        scored_batch([wrong, right])
    assert len(scored_batch([pending([i.rollout for i in items[:2]], [i.scores for i in items[:2]]), right]).items) == 3


def test_where_nothing_is_left_the_teachers_words_are_repeated():
    [item] = scored_rollouts([5], VOCABULARY)
    with pytest.raises(StageError, match="none of 1 rollouts .* 1 it failed on; the teacher said: out of memory$"):
        scored_batch([pending([item.rollout], [NoScores(reason="teacher_error", said="out of memory")])])
