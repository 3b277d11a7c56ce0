"""A teacher behind HTTP, without a server: what it is not asked, and what still waits for it."""

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.errors import StageError
from opsd.monitor.step import queue_lengths
from opsd.teacher.pool import PendingScores, TeacherPool
from opsd.teacher.remote.http import PendingPart
from opsd.teacher.remote.openai import PendingRollout
from opsd.teacher.served import Asked
from opsd.types import Mixture, Vocabulary
from tests.opsd.builders import scored_rollouts

VOCABULARY = Vocabulary(size=40, stop_ids=(0,))


@pytest.mark.parametrize("backend", ["http", "openai"])
def test_mixed_embeddings_are_not_sent_as_if_they_were_tokens(backend):
    [item] = scored_rollouts([4], VOCABULARY)
    other_ids = np.concatenate([item.rollout.prompt.token_ids, item.rollout.response_ids])
    mixed = replace(item.rollout, mixture=Mixture(other_ids=other_ids, own_share=0.5))
    cfg = TeacherConfig(backend=backend, urls=["http://127.0.0.1:1"])
    pool = TeacherPool(teacher_spec(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64))
    with pytest.raises(StageError, match=f"backend={backend} reads token ids, not mixed embeddings"):
        pool.begin([{0: mixed}])


@pytest.mark.parametrize("backend", ["http", "openai"])
def test_a_group_waits_until_the_last_of_its_requests_is_answered(backend):
    rollouts = [item.rollout for item in scored_rollouts([4, 3, 2], VOCABULARY)]
    cfg = TeacherConfig(backend=backend, urls=["http://127.0.0.1:1"])
    pool = TeacherPool(teacher_spec(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64))
    responses = [Future() for _ in rollouts]
    parts = [
        PendingPart(rollouts=[rollout], scores=response)
        if backend == "http"
        else PendingRollout(rollout=rollout, scores=response)
        for rollout, response in zip(rollouts, responses, strict=True)
    ]
    pending = [
        PendingScores(
            rollouts={place: rollouts[min(place, 2)] for place in places},
            scored_places=places if parts else (),
            parts=[Asked(rollouts=rollouts, pending=parts)],
            engines=pool.engines,
            teacher="t",
        )
        for places, parts in (((0, 1), parts[:2]), ((2,), parts[2:]), ((3,), []))  # foreign ids: nothing to wait for
    ]
    assert queue_lengths(pending) == {"queue/rollouts": 3, "queue/groups": 2}
    responses[1].set_result(None)
    responses[2].set_result(None)
    assert queue_lengths(pending) == {"queue/rollouts": 2, "queue/groups": 1}
    responses[0].set_result(None)
    assert queue_lengths(pending) == {"queue/rollouts": 0, "queue/groups": 0}
