"""The server's HTTP side with a stand-in for the engine's process: admission, the token, batching, metrics.

Behind real sockets: test_connections.py. With an engine: test_hostile.py, tests/integration/test_teacher_server.py.
"""

import asyncio

import httpx
import numpy as np
import pytest

from opsd.teacher.remote.wire import pack_score_request, unpack_scores
from opsd.teacher.server.app import make_app
from tests.opsd.teacher.server.stand_in import BODY, ROLLOUTS, VOCABULARY, Engine, changed, service_of, wait_until


def with_server(test, **settings):
    """Runs `test(client, engine, batcher, service)` against the app, its queue being worked off beside it."""

    async def main():
        engine = Engine()
        service = service_of(engine.score, **settings)
        work = asyncio.create_task(service.batcher.run())
        transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            await asyncio.wait_for(test(client, engine, service.batcher, service), timeout=60)
        work.cancel()

    asyncio.run(main())


async def post_behind_the_first(client, engine, batcher, bodies) -> list[asyncio.Task]:
    """The first body is with the engine when the others are sent; returns when these wait."""
    answers = [asyncio.create_task(client.post("/score", content=bodies[0]))]
    await wait_until(lambda: engine.calls)
    answers += [asyncio.create_task(client.post("/score", content=body)) for body in bodies[1:]]
    await wait_until(lambda: len(batcher) == len(bodies) - 1)
    return answers


def test_scores_come_back_to_the_request_that_they_are_of():
    """Three clients at once, the second of which is merged with the third while the first is scored."""

    async def test(client, engine, batcher, service):
        bodies = [pack_score_request([r], 4, VOCABULARY, with_candidates=False) for r in ROLLOUTS]
        answers = await post_behind_the_first(client, engine, batcher, bodies)
        engine.go.set()
        for rollout, answer in zip(ROLLOUTS, await asyncio.gather(*answers), strict=True):
            [scores] = unpack_scores(answer.content, [len(rollout)])
            assert scores.sampled_logprobs.tolist() == rollout.response_ids.tolist()
        assert engine.calls == [1, 2]
        page = (await client.get("/metrics")).text
        assert 'opsd_teacher_requests_total{endpoint="/score"} 3.0' in page
        assert 'opsd_teacher_tokens_total{endpoint="/score"} 21.0' in page
        assert 'opsd_teacher_batch_requests_bucket{le="1.0"} 1.0' in page
        assert "opsd_teacher_batch_requests_count 2.0" in page
        assert "opsd_teacher_queue_length 0.0" in page
        assert 'opsd_teacher_request_seconds_count{endpoint="/score"} 3.0' in page

    with_server(test)


@pytest.mark.parametrize("other", [{"top_k": 3}, {"stop_ids": [0, 2]}])
def test_requests_that_differ_are_not_merged(other):
    async def test(client, engine, batcher, service):
        bodies = [BODY, BODY, changed(**other)]  # the last two wait together
        answers = await post_behind_the_first(client, engine, batcher, bodies)
        engine.go.set()
        assert [answer.status_code for answer in await asyncio.gather(*answers)] == [200] * 3
        assert engine.calls == [3, 3, 3]

    with_server(test)


@pytest.mark.parametrize(("max_merged_tokens", "calls"), [(45, [3, 6, 3]), (0, [3, 3, 3, 3])])
def test_a_merged_call_stays_below_the_bound(max_merged_tokens, calls):
    """21 tokens a request."""

    async def test(client, engine, batcher, service):
        answers = await post_behind_the_first(client, engine, batcher, [BODY] * 4)
        engine.go.set()
        assert all(answer.status_code == 200 for answer in await asyncio.gather(*answers))
        assert engine.calls == calls

    with_server(test, max_merged_tokens=max_merged_tokens)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"no frame", 400, "not a safetensors frame"),
        (b"0" * 5000, 413, "a body may have 4096 bytes, got 5000 or more"),
        (changed(top_k=9), 422, r"top_k must be in 1..8, got 9"),
        (changed(top_k=0), 422, r"top_k must be in 1..8, got 0"),
        (changed(response_ids=[44] * 12), 422, "response_ids must lie in 0..39, got 44 to 44"),
        (changed(response_ids=[40] * 12), 422, "response_ids must lie in 0..39, got 40 to 40"),
        (changed(response_ids=[7] * 12, foreign_ids=[7]), 422, "response_ids must hold none of .* foreign_ids"),
        (changed(shared_size=1, response_ids=[1] * 12), 422, "response_ids must lie in 0..0, got 1 to 1"),
        (changed(prompt_ids=[-1] * 9), 422, "prompt_ids must lie in 0..43, got -1 to -1"),
        (changed(shared_size=45), 422, "shared_size must be at most 44, got 45"),
        (changed(prompt_lengths=[7, 1, 1], response_lengths=[10, 1, 1]), 422, "rollout 0: .* 12 tokens, got 17"),
        (changed(candidate_ids=[[40]] * 12), 422, "candidate_ids must lie in -1..39, got 40 to 40"),
        (changed(candidate_ids=[[3]] * 12, foreign_ids=[3]), 422, "candidate_ids must hold none of .* foreign_ids"),
        (changed(candidate_ids=[[1] * 6] * 12), 422, r"candidate_ids must have 1..5 columns, got 6"),
        (changed(candidate_ids=np.zeros((12, 0))), 422, r"candidate_ids must have 1..5 columns, got 0"),
        (changed(top_k=8, candidate_ids=[[1] * 5] * 12), 413, "may have 1000 bytes, this one would have 1104"),
        (changed(with_hidden=1), 422, "with_hidden must be 0: this server's engine returns no hidden states"),
        (changed(shared_size=2**21), 400, "shared_size must be in 1..1048576"),
        (changed(foreign_ids=range(1, 50)), 400, "got 40, 1 stop_ids and 49 foreign_ids"),
        (pack_score_request(ROLLOUTS * 2, 4, VOCABULARY, with_candidates=False), 413, "may have 4 rollouts, got 6"),
        (changed(response_ids=[1] * 60, response_lengths=[20] * 3), 413, "may have 60 tokens, got 69"),
        (changed(stop_ids=[]), 400, "stop_ids must be ascending, distinct and at least one"),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_the_next_is_served(body, status, said):
    async def test(client, engine, batcher, service):
        engine.go.set()
        refused = await client.post("/score", content=body)
        assert refused.status_code == status
        assert list(refused.json()) == ["error"]
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(refused.json()["error"])
        assert engine.calls == []
        assert (await client.post("/score", content=BODY)).status_code == 200
        page = (await client.get("/metrics")).text
        assert f'opsd_teacher_refusals_total{{endpoint="/score",status="{status}"}} 1.0' in page

    with_server(test)


def test_a_body_without_a_length_is_cut_off_at_the_limit():
    """Chunked: the client does not say how much will come."""

    async def test(client, engine, batcher, service):
        sent = 0

        async def parts():
            nonlocal sent
            for _ in range(100):
                sent += 1024
                yield b"0" * 1024

        assert (await client.post("/score", content=parts())).status_code == 413
        assert sent < 10 * 1024

    with_server(test)


@pytest.mark.parametrize("given", ["", "Bearer wrong", "Bearer s3cre", "Bearer s3crets", "Basic s3cret", "Bearer \xff"])
def test_a_wrong_token_is_refused_everywhere_but_for_health(given):
    async def test(client, engine, batcher, service):
        engine.go.set()
        headers = {"Authorization": given.encode("latin-1")} if given else {}
        for method, path in [("GET", "/info"), ("GET", "/vocabulary"), ("GET", "/metrics"), ("POST", "/score"),
                             ("POST", "/generate")]:  # fmt: skip
            refused = await client.request(method, path, content=BODY, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
        assert engine.calls == []
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200
        allowed = await client.post("/score", content=BODY, headers={"Authorization": "Bearer s3cret"})
        assert allowed.status_code == 200

    with_server(test, token="s3cret")


def test_before_the_model_is_loaded_a_client_is_told_to_come_back():
    async def test(client, engine, batcher, service):
        service.info = None
        assert (await client.get("/health")).status_code == 200
        for method, path in [("GET", "/ready"), ("GET", "/info"), ("POST", "/score")]:
            refused = await client.request(method, path, content=BODY)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")

    with_server(test)


def test_bodies_under_way_leave_room_for_so_many_and_their_room_comes_back():
    async def test(client, engine, batcher, service):
        answers = await post_behind_the_first(client, engine, batcher, [BODY] * 2)
        assert service.intake.held_bytes == 2 * len(BODY)
        refused = await client.post("/score", content=BODY)
        assert (refused.status_code, "leave no room" in refused.text) == (503, True)
        engine.go.set()
        assert all(answer.status_code == 200 for answer in await asyncio.gather(*answers))
        assert (await client.post("/score", content=BODY)).status_code == 200
        assert service.intake.held_bytes == 0

    with_server(test, max_held_bytes=3 * len(BODY) - 1)


def test_paths_that_are_not_there_are_refused_in_the_same_form():
    async def test(client, engine, batcher, service):
        for method, path, status in [("GET", "/nothing", 404), ("GET", "/score", 405), ("PUT", "/info", 405)]:
            refused = await client.request(method, path)
            assert (refused.status_code, list(refused.json())) == (status, ["error"])
        assert "nothing" not in service.metrics.page().decode()

    with_server(test)


def test_a_full_queue_refuses_and_recovers():
    async def test(client, engine, batcher, service):
        answers = await post_behind_the_first(client, engine, batcher, [BODY] * 3)
        refused = await client.post("/score", content=BODY)
        assert refused.status_code == 503 and "2 requests are waiting" in refused.json()["error"]
        engine.go.set()
        assert all(answer.status_code == 200 for answer in await asyncio.gather(*answers))
        assert (await client.post("/score", content=BODY)).status_code == 200

    with_server(test, max_queued=2)


def test_an_engine_that_fails_once_goes_on():
    async def test(client, engine, batcher, service):
        engine.go.set()
        engine.error = RuntimeError("out of memory")
        assert (await client.post("/score", content=BODY)).status_code == 500
        engine.error = None
        assert (await client.post("/score", content=BODY)).status_code == 200

    with_server(test)
