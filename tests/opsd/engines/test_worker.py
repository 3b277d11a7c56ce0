"""What an engine's actor keeps of a step is there as long as it is asked for, and no longer."""

from types import SimpleNamespace

import numpy as np
import pytest

from opsd.engines.worker import EngineWorker
from opsd.errors import StageError
from opsd.payload.kept import Wanted
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))
WANTED = Wanted(support="teacher", num_candidates=8)


def worker_of(items):
    """Its engine knows the scores of these rollouts."""
    worker, scores = EngineWorker(), {id(item.rollout): item.scores for item in items}
    worker.name = "/models/t"
    worker.engine = SimpleNamespace(
        vocabulary=VOCABULARY, score=lambda rollouts, top_k: [scores[id(rollout)] for rollout in rollouts]
    )
    return worker


def test_parts_are_kept_together_until_they_are_closed_or_dropped():
    items = scored_rollouts([4, 3, 5], VOCABULARY)
    worker = worker_of(items)
    for key, item in enumerate(items):
        worker.score(key, [item.rollout], 8, None)
    part = worker.told([2, 0])
    assert (part.num_rollouts, len(part.stats["entropy_T"])) == (2, 9)
    first, second = worker.rows(2, [np.array([0, 6]), np.array([8])], WANTED)  # places in the tokens of 2, then of 0
    assert (first.num_kept_S.tolist(), second.num_kept_S.tolist()) == ([1, 1], [1])
    assert second.token_ids_L[-1] == items[0].rollout.response_ids[2]  # what stands before the last token
    assert worker.rows(2, [np.array([0])], WANTED).num_kept_S.tolist() == [1]
    assert worker.num_kept() == 2
    assert worker.close(2, np.array([0, 6, 8]))["known"] == 9.0
    worker.told([1])
    worker.drop(1)
    assert worker.num_kept() == 0


def test_scores_of_other_tokens_are_said_where_they_are_told_of():
    one, other = scored_rollouts([4, 4], VOCABULARY)
    worker = worker_of([one, other])
    worker.engine.score = lambda rollouts, top_k: [other.scores]
    worker.score(0, [one.rollout], 8, None)
    with pytest.raises(StageError, match="the teacher /models/t gives token"):
        worker.told([0])
    assert worker.num_kept() == 0
