"""Rollouts that cannot be trained on are dropped and counted; the others keep their own scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opsd.batch import batch_stats, drop_foreign, join
from opsd.errors import StageError
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))


def with_nan(scores):
    broken = scores.top_logprobs.copy()
    broken[0, 1] = np.nan
    return replace(scores, top_logprobs=broken)


def test_a_rollout_with_a_nan_score_is_dropped_and_counted():
    items = scored_rollouts([5, 3, 4], VOCABULARY)
    rollouts = [item.rollout for item in items]
    scores = [items[0].scores, with_nan(items[1].scores), items[2].scores]
    scored, dropped = join(rollouts, scores, VOCABULARY)
    assert [item.rollout for item in scored] == [rollouts[0], rollouts[2]]
    assert [item.scores for item in scored] == [scores[0], scores[2]]
    assert dropped["nan_score"] == 1
    batch = batch_stats(7, scored)
    assert (batch.step, batch.lengths) == (7, (5, 4))
    assert torch.equal(batch.tokens.reverse_kl_T[5:], items[2].stats.reverse_kl_T)


def test_nothing_but_nan_stops_the_run():
    items = scored_rollouts([5, 3], VOCABULARY)
    with pytest.raises(StageError, match="all 2 rollouts of this step have NaN"):
        join([item.rollout for item in items], [with_nan(item.scores) for item in items], VOCABULARY)


def test_a_padded_token_drops_its_rollout():
    first, second = (item.rollout for item in scored_rollouts([5, 3], VOCABULARY))
    foreign = replace(second, response_ids=np.array([1, 20, 2], np.int32))
    kept, dropped = drop_foreign([first, foreign], VOCABULARY)
    assert kept == [first]
    assert dropped["foreign_token"] == 1
