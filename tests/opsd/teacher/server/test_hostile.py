"""A server with an engine under hostile requests and under many clients: none of them changes another's answer."""

import asyncio
import socket
from collections import Counter
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from opsd.engines.sampling import Sampling
from opsd.teacher.remote.wire import pack_generate_request, pack_score_request, unpack_score_request, unpack_scores
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts
from tests.opsd.teacher.server.engine_in_thread import TOP_K, serving_engine
from tests.opsd.teacher.server.hostile import OTHER_BODIES, bodies, frames_with_headers

pytestmark = pytest.mark.slow  # its tests take more than ten seconds together: real servers and processes

VOCABULARY = Vocabulary(size=60, stop_ids=(0, 3), foreign_ids=(58, 59))
SHARED = Vocabulary(size=58, stop_ids=(0, 3))  # from which the tokens are drawn
ROLLOUTS = [item.rollout for item in scored_rollouts([4, 9, 1, 6], SHARED, top_k=5)]
NUM_CLIENTS, NUM_REQUESTS = 64, 4
REFUSED = {400, 413, 422}
HEAD = b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving_engine(tmp_path_factory.mktemp("teacher")) as found:
        yield found


def score_body(rollouts):
    return pack_score_request(rollouts, TOP_K, VOCABULARY, with_candidates=True, with_hidden=True)


def generate_body():
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_tokens=3, num_candidates=1)
    return pack_generate_request([rollout.prompt for rollout in ROLLOUTS], [1, 2, 3, 4], sampling, VOCABULARY)


def expect_equal(frame, rollouts, wanted):
    """Bit for bit."""
    for got, scores in zip(unpack_scores(frame, [len(rollout) for rollout in rollouts]), wanted, strict=True):
        for name in ("top_ids", "top_logprobs", "sampled_logprobs", "candidate_logprobs", "entropy", "hidden"):
            np.testing.assert_array_equal(getattr(got, name), getattr(scores, name))


def test_hostile_bodies_are_refused_and_the_next_good_request_is_answered_the_same(served):
    url, score = served
    good = score_body(ROLLOUTS)
    wanted = score(unpack_score_request(good))
    asked = [("/score", body, "application/vnd.safetensors") for body in [*bodies(good, 0), *frames_with_headers()]]
    asked += [("/generate", body, "application/vnd.safetensors") for body in bodies(generate_body(), 1)]
    asked += [(path, body, kind) for path in ("/score", "/generate") for body, kind in OTHER_BODIES]
    statuses = Counter()
    with httpx.Client(base_url=url, timeout=60) as client:
        for place, (path, body, kind) in enumerate(asked):
            answer = client.post(path, content=body, headers={"content-type": kind})
            statuses[answer.status_code] += 1
            assert answer.status_code in {200, *REFUSED}, (path, answer.text, body[:2000])
            if answer.status_code != 200:
                assert list(answer.json()) == ["error"] and len(answer.json()["error"]) <= 500
            if place % 50 == 0:
                expect_equal(client.post("/score", content=good).content, ROLLOUTS, wanted)
        expect_equal(client.post("/score", content=good).content, ROLLOUTS, wanted)
    assert statuses.total() > 300 and min(statuses[status] for status in REFUSED) > 1, statuses
    assert statuses[200] < statuses.total() / 2, statuses  # a changed id may still be a good one


def test_hostile_paths_and_methods_reach_no_file(served):
    url, _ = served
    paths = [
        "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/score/../info", "/docs", "/openapi.json",
        "/score%00", "/info?" + "a=1&" * 500, "/\N{SNOWMAN}", "/" + "a" * 5000, "/info/", "/.git/config",
    ]  # fmt: skip
    methods = ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD", "CONNECT", "A"]
    with httpx.Client(base_url=url, timeout=60) as client:
        for path in paths:
            for method in methods:
                answer = client.request(method, path, content=b"x" if method == "PUT" else None)
                assert answer.status_code in {200, 400, 404, 405}, (method, path)
                assert b"root:" not in answer.content


def test_many_clients_at_once_get_each_its_own_answer_while_one_stalls_in_mid_body(served):
    url, score = served
    shared = Vocabulary(size=40, stop_ids=(0,))
    rollouts = [item.rollout for item in scored_rollouts([1 + n % 23 for n in range(24)], shared, top_k=5, seed=3)]
    frames = [score_body([rollout]) for rollout in rollouts]
    wanted = [score(unpack_score_request(frame)) for frame in frames]

    async def ask(number):
        async with httpx.AsyncClient(timeout=60, verify=False) as client:
            for turn in range(NUM_REQUESTS):
                place = (number * 7 + turn * 13) % len(frames)
                answer = await client.post(f"{url}/score", content=frames[place])
                assert answer.status_code == 200, answer.text
                expect_equal(answer.content, [rollouts[place]], wanted[place])

    async def all_at_once():
        await asyncio.gather(*(ask(number) for number in range(NUM_CLIENTS)))

    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as stalled:
        stalled.sendall(
            b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(frames[0]) + frames[0][:100]
        )
        asyncio.run(all_at_once())
        stalled.sendall(frames[0][100:])  # it still may go on
        assert stalled.recv(1 << 16).startswith(b"HTTP/1.1 200")
