"""Rollouts that cannot be trained on are dropped and counted; the others keep their own scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opsd.batch import batch_stats, drop_unusable, rollout_stats
from opsd.errors import StageError
from opsd.types import NoScores, Vocabulary
from tests.opsd.builders import scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))


def with_nan(scores):
    broken = scores.top_logprobs.copy()
    broken[0, 1] = np.nan
    return replace(scores, top_logprobs=broken)


def test_unusable_rollouts_are_dropped_and_counted():
    items = scored_rollouts([5, 3, 4, 2], VOCABULARY)
    answered = [(item.rollout, item.scores) for item in items]
    answered[1] = (items[1].rollout, with_nan(items[1].scores))
    answered[3] = (items[3].rollout, NoScores(reason="foreign_token"))  # a padded token: the teacher was not asked
    scored, dropped = drop_unusable(answered)
    assert [item.rollout for item in scored] == [items[0].rollout, items[2].rollout]
    assert [item.scores for item in scored] == [items[0].scores, items[2].scores]
    assert dropped == {"nan_score": 1, "foreign_token": 1}
    batch = batch_stats(7, scored, rollout_stats(scored, VOCABULARY), None, num_steps=10)
    assert (batch.step, batch.lengths) == (7, (5, 4))
    alone = rollout_stats([items[2]], VOCABULARY)
    assert torch.equal(batch.tokens.reverse_kl_T[5:], alone.reverse_kl_T)


def test_nothing_but_nan_stops_the_run():
    items = scored_rollouts([5, 3], VOCABULARY)
    with pytest.raises(StageError, match="none of 2 rollouts can be used: .* 2 have NaN in the teacher's scores"):
        drop_unusable([(item.rollout, with_nan(item.scores)) for item in items])
