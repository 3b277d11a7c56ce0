"""A teacher behind servers, from the driver's side: it hands over references, and is told statistics."""

import gc
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import ray

from opsd.batch import scored_batch
from opsd.cluster.ray import ray_cluster
from opsd.engines.candidates import away, taken_out
from opsd.errors import StageError, WorkerLost
from opsd.payload.keeper import ScoredPart, described
from opsd.payload.kept import KeptRows, Wanted
from opsd.payload.scored import ScoredBatch
from opsd.teacher.pool import TeacherPool
from opsd.types import ScoredRollout, TeacherScores
from tests.opsd.builders import batch_of
from tests.opsd.teacher.server.test_bad_requests import (
    ITEMS,
    QUICK,
    ROLLOUTS,
    SAYS,
    VOCABULARY,
    frame_server,
    server,
    spec_of,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
TOKEN = "s3cret-of-the-driver"  # which no process of the Ray node has in its environment
WANTED = Wanted(support="teacher", num_candidates=8)
HTTP = replace(QUICK, give_up_after_s=30)


class Says:
    """What the server does with the next requests."""

    answer = staticmethod(frame_server({}))


@pytest.fixture(scope="module")
def pool(joined):
    with pytest.MonkeyPatch.context() as patch, server(lambda *asked: Says.answer(*asked), TOKEN) as url:
        patch.setenv("OPSD_TEACHER_TOKEN", TOKEN)
        with ray_cluster(dashboard=False):
            pool = TeacherPool(spec_of("http", [url], HTTP))
            pool.wait_ready()
            yield pool


@pytest.fixture(autouse=True)
def well():
    yield
    Says.answer = frame_server({})


def in_groups(size):
    places = list(ROLLOUTS)
    return [{p: ROLLOUTS[p] for p in places[start : start + size]} for start in range(0, len(places), size)]


def held():
    """What this process has of payloads."""
    kinds = (TeacherScores, ScoredRollout, ScoredBatch, KeptRows)
    return sum(type(each) in kinds for each in gc.get_objects())


def expect_all_scores(batch):
    assert [rollout.response_ids.tolist() for rollout in batch.rollouts] == [
        rollout.response_ids.tolist() for rollout in ROLLOUTS.values()
    ]
    for name, wanted_T in described(batch_of(ITEMS), VOCABULARY).stats.items():
        np.testing.assert_array_equal(batch.tokens.known()[name], wanted_T)


def test_all_groups_are_under_way_at_once_and_the_driver_never_holds_a_score(pool):
    """The server answers none before it has all."""
    groups = in_groups(2)
    there, answer = threading.Barrier(len(groups)), frame_server({})

    def together(path, body):
        there.wait(timeout=60)
        return answer(path, body)

    Says.answer = together
    before = held()
    references = []
    for group in groups:
        written, candidates = taken_out(group)
        references.append(away(written, {p: (r.prompt, r.sample, 0) for p, r in group.items()}, ray.put(candidates)))
    pending = pool.begin(references)
    assert len({part.key for group in pending for part in group.parts}) == len(groups)
    batch = scored_batch(pending)
    Says.answer = answer
    gc.collect()
    assert held() == before
    expect_all_scores(batch)
    [payload] = batch.payloads
    rows = payload.rows([np.array([0, 3])], WANTED)
    assert all(isinstance(each, ray.ObjectRef) for each in rows)
    kept = ray.get(rows[0])
    assert kept.num_kept_S.tolist() == [2]
    assert held() == before + 1  # else it would not show
    [told] = pool.engines.scores(pool.begin(groups[:1])[0].parts)
    assert isinstance(told.part, ScoredPart)
    told.payload.drop()
    assert payload.close(np.array([0, 3]))()["known"] > 0


def test_what_the_client_warns_of_is_said_here_while_its_scores_are_waited_for(pool, caplog):
    """The server is well only once the warning was seen; it fails on one answer of the eight."""
    answer = frame_server({5: SAYS["500"][0]})
    said = threading.Event()

    def ill_until_said(path, body):
        if any("its requests go elsewhere or wait" in record.message for record in caplog.records):
            said.set()
        return answer(path, body) if said.is_set() else (503, "starting")

    Says.answer = ill_until_said
    batch = scored_batch(pool.begin([ROLLOUTS]))
    batch.release()
    assert batch.dropped["teacher_error"] == 1 and len(batch.rollouts) == 7
    lines = [record.message for record in caplog.records]
    assert [line.split(": ", 1)[0] for line in lines] == [
        f"teacher server {pool.cfg.where}",
        f"teacher server {pool.cfg.where} answers again",
        "an answer without scores, which is dropped",
    ]
    assert {record.name for record in caplog.records} == {"opsd.teacher.remote.transport"}


def test_a_request_that_is_refused_whole_ends_the_run_with_what_the_server_said(pool):
    Says.answer = lambda path, body: (403, "not you")
    with pytest.raises(StageError, match=r"^score: http\S*/score refuses: 403 not you$"):
        scored_batch(pool.begin([ROLLOUTS]))


def test_a_client_that_is_lost_is_started_again_and_asks_again(pool):
    pool.engines.actors.restart_lost(1, None)
    begun, killed, answer = threading.Event(), threading.Event(), frame_server({})

    def late(path, body):
        begun.set()
        killed.wait(timeout=60)
        return answer(path, body)

    Says.answer = late
    scored = pool.begin(in_groups(4))
    begun.wait(timeout=60)
    worker = pool.engines.workers[0]
    os.kill(ray.get(worker.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    killed.set()
    batch = scored_batch(scored)
    expect_all_scores(batch)
    batch.release()
    assert pool.num_restarts == 1
    os.kill(ray.get(pool.engines.workers[0].__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
    with pytest.raises(WorkerLost, match="^score: worker 0 was lost"):
        scored_batch(pool.begin([ROLLOUTS]))
