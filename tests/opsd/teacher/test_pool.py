"""A teacher behind HTTP, without a run: what it is not asked, and when a group of rollouts is scored."""

import asyncio
import threading
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest

import opsd.teacher.pool
from opsd.errors import StageError
from opsd.teacher.pool import TeacherPool
from opsd.types import Mixture
from tests.opsd.teacher.server.test_bad_requests import (
    ROLLOUTS,
    TOP_K,
    client_of,
    frame_server,
    json_server,
    server,
    spec_of,
)

ANSWERS = {"http": frame_server({}), "openai": json_server({})}


@pytest.mark.parametrize("backend", ["http", "openai"])
def test_mixed_embeddings_are_not_sent_as_if_they_were_tokens(backend, monkeypatch):
    """It is refused before the engines, here none, are asked."""
    monkeypatch.setattr(opsd.teacher.pool, "ServedTeacher", lambda *asked, **options: Mock())
    rollout = ROLLOUTS[0]
    other_ids = np.concatenate([rollout.prompt.token_ids, rollout.response_ids])
    mixed = replace(rollout, mixture=Mixture(other_ids=other_ids, own_share=0.5))
    pool = TeacherPool(spec_of(backend, ["http://127.0.0.1:1"]))
    with pytest.raises(StageError, match=f"backend={backend} reads token ids, not mixed embeddings"):
        pool.begin([{0: mixed}])


@pytest.mark.parametrize("backend", ["http", "openai"])
def test_a_group_waits_until_the_last_of_its_requests_is_answered(backend):
    """One of two servers holds the first request that it gets back."""
    go_on, num_answered, lock = threading.Event(), [0], threading.Lock()

    def answer(path, body):
        with lock:
            num_answered[0] += 1
            is_first = num_answered[0] == 1
        if is_first:
            go_on.wait(timeout=60)
        return ANSWERS[backend](path, body)

    async def score(client):
        scored = asyncio.ensure_future(client.score(list(ROLLOUTS.values()), TOP_K))
        others = len(ROLLOUTS) if backend == "openai" else 2  # requests
        while num_answered[0] < others:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not scored.done()
        go_on.set()
        return await scored

    with server(answer) as a, server(answer) as b:
        scores = asyncio.run(score(client_of(backend, [a, b])))
    assert [len(each.sampled_logprobs) for each in scores] == [len(rollout) for rollout in ROLLOUTS.values()]
