"""A server that cannot answer for one rollout: that rollout is dropped and counted, and the server stays in use."""

import asyncio
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest

from opsd.batch import PendingScores, scored_batch
from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.config.http import HttpConfig
from opsd.errors import StageError
from opsd.teacher.remote.frames import PROTOCOL
from opsd.teacher.remote.wire import pack_scores, unpack_score_request
from opsd.teacher.served import CLIENTS, served_spec
from opsd.types import Vocabulary
from tests.opsd.builders import Answers, kept_here, scored_rollouts
from tests.opsd.teacher.served import serving

pytestmark = pytest.mark.slow  # its tests take more than ten seconds together: real servers and processes

VOCABULARY = Vocabulary(size=40, stop_ids=(0,))
TOP_K = 8
ITEMS = scored_rollouts([5, 3, 4, 2, 6, 3, 2, 4], VOCABULARY, top_k=TOP_K)
ROLLOUTS = dict(enumerate(item.rollout for item in ITEMS))
QUICK = HttpConfig(backoff_s=0.01, max_backoff_s=0.05, give_up_after_s=60, start_timeout_s=60)
HASTY = HttpConfig(backoff_s=0.01, max_backoff_s=0.05, give_up_after_s=0.5, start_timeout_s=60)
MODELS = {"data": [{"id": "teacher", "max_model_len": 64}]}
INFO = {
    "protocol": PROTOCOL, "scores_candidates": False, "max_rollouts": 99, "max_tokens": 10**6, "max_body_bytes": 10**6,
    "max_answer_bytes": 10**6, "hidden_bytes": 0, "vocab_size": 40, "max_model_tokens": 64, "max_top_k": TOP_K,
    "stop_ids": [0],
}  # fmt: skip
DIES = object()  # in place of an answer: the connection ends


@contextmanager
def server(answer, token=""):
    """`answer(path, body) -> (status, text or bytes)`; yields its address. `token`: without it all is refused."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, json.dumps(MODELS if self.path == "/v1/models" else INFO))

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            is_known = not token or self.headers.get("authorization") == f"Bearer {token}"
            said = answer(self.path, body) if is_known else (401, "who is there?")
            if said is DIES:
                self.close_connection = True
            else:
                self.reply(*said)

        def reply(self, status, text):
            body = text if isinstance(text, bytes) else text.encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with serving(Handler) as url:
        yield url


def place_of(token_ids):
    """Which of ITEMS these ids are of; None: of none, the client asks whether the server is well."""
    own = {(*r.prompt.token_ids.tolist(), *r.response_ids.tolist()): place for place, r in ROLLOUTS.items()}
    return own.get(tuple(token_ids))


def prompt_logprobs(place):
    """As vLLM's JSON has them, of the scores that the test knows."""
    item = ITEMS[place]
    rows = [None] * len(item.rollout.prompt.token_ids)
    for ids, logprobs, actual, own in zip(
        item.scores.top_ids, item.scores.top_logprobs, item.rollout.response_ids, item.scores.sampled_logprobs,
        strict=True,
    ):  # fmt: skip
        named = dict(zip(ids.tolist(), logprobs.tolist(), strict=True)) | {int(actual): float(own)}
        rows.append({str(token): {"logprob": logprob} for token, logprob in named.items()})
    return rows


def json_server(bad):
    """A `vllm serve` that knows the scores of ITEMS; `bad`: what it says instead, by place."""

    def answer(path, body):
        place = place_of(json.loads(body)["prompt"])
        if place is None:
            return 200, "{}"
        return bad.get(place) or (200, json.dumps({"choices": [{"prompt_logprobs": prompt_logprobs(place)}]}))

    return answer


def frame_server(bad):
    """Ours; a request fails on its first bad rollout."""

    def answer(path, body):
        asked = unpack_score_request(body).rollouts
        places = [place_of([*r.prompt.token_ids.tolist(), *r.response_ids.tolist()]) for r in asked]
        if places == [None]:
            return 200, ""
        failing = [bad[place] for place in places if place in bad]
        return (failing or [(200, pack_scores([ITEMS[place].scores for place in places], with_candidates=False))])[0]

    return answer


def spec_of(backend, urls, http=QUICK):
    cfg = TeacherConfig(backend=backend, urls=urls, http=http, top_k=TOP_K)
    return teacher_spec(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64)


def client_of(*asked):
    return CLIENTS[asked[0]](served_spec(spec_of(*asked)))


def scored(client):
    rollouts = list(ROLLOUTS.values())
    parts = kept_here(rollouts, asyncio.run(client.score(rollouts, TOP_K)), VOCABULARY)
    places = tuple(ROLLOUTS)
    pending = PendingScores(rollouts=ROLLOUTS, scored_places=places, parts=parts, engines=Answers(), teacher="t")
    batch = scored_batch([pending])
    return [item for payload in batch.payloads for item in payload.whole().items], batch.dropped


NAN = json.dumps({"choices": [{"prompt_logprobs": [{"1": {"logprob": float("nan")}, "2": {"logprob": -1.0}}] * 9}]})
SAYS = {
    "500": ((500, "NaN in the logits"), "teacher_error"),
    "another 5xx": ((507, "no room"), "teacher_error"),
    "too long": ((400, "this model's context is 8 tokens"), "teacher_refused"),
    "no JSON": ((200, "<html>"), "teacher_error"),
    "JSON without scores": ((200, '{"choices": []}'), "teacher_error"),
    "null in place of a number": ((200, NAN.replace("NaN", "null")), "teacher_error"),
}


@pytest.mark.parametrize("num_servers", [1, 2])
@pytest.mark.parametrize("said", SAYS)
def test_answers_that_no_server_can_score_are_dropped_and_counted(said, num_servers):
    says, reason = SAYS[said]
    with server(json_server({0: says, 5: says})) as a, server(json_server({0: says, 5: says})) as b:
        client = client_of("openai", [a, b][:num_servers])
        for _ in range(2):
            usable, dropped = scored(client)
            assert dropped == {reason: 2, "foreign_token": 0, "nan_score": 0}
            assert [item.rollout for item in usable] == [ROLLOUTS[place] for place in (1, 2, 3, 4, 6, 7)]
            for item, place in zip(usable, (1, 2, 3, 4, 6, 7), strict=True):
                assert np.array_equal(item.scores.top_logprobs, ITEMS[place].scores.top_logprobs)
        assert all(each.failures == 0 for each in client.transport.servers)


def test_a_nan_in_the_numbers_is_counted_as_such():
    rows = prompt_logprobs(2)
    rows[-1] = {token: {"logprob": float("nan")} for token in rows[-1]}
    with server(json_server({2: (200, json.dumps({"choices": [{"prompt_logprobs": rows}]}))})) as url:
        usable, dropped = scored(client_of("openai", [url]))
    assert dropped == {"nan_score": 1, "foreign_token": 0}
    assert len(usable) == len(ITEMS) - 1


@pytest.mark.parametrize("said", ["500", "too long", "no JSON"])
def test_of_a_request_with_many_rollouts_only_those_are_dropped_that_it_fails_on(said):
    says, reason = SAYS[said]
    with server(frame_server({0: says, 5: says})) as a, server(frame_server({0: says, 5: says})) as b:
        client = client_of("http", [a, b])
        usable, dropped = scored(client)
    assert dropped[reason] == 2 and dropped.total() == 2
    assert [item.rollout for item in usable] == [ROLLOUTS[place] for place in (1, 2, 3, 4, 6, 7)]
    assert np.array_equal(usable[-1].scores.top_logprobs, ITEMS[7].scores.top_logprobs)


@pytest.mark.parametrize("ill", [(500, "out of memory"), (503, "starting"), DIES])
def test_a_server_that_fails_on_everything_costs_no_answer(ill):
    with server(lambda path, body: ill) as bad, server(json_server({3: SAYS["500"][0]})) as good:
        client = client_of("openai", [bad, good])
        usable, dropped = scored(client)
        assert dropped["teacher_error"] == 1 and len(usable) == len(ITEMS) - 1
        ill_server, well_server = client.transport.servers
        assert ill_server.failures > 0 and well_server.failures == 0


def test_when_all_servers_fall_ill_the_run_ends_and_no_answer_is_blamed():
    is_ill = threading.Event()
    well = json_server({})

    def answer(path, body):
        return (500, "out of memory") if is_ill.is_set() else well(path, body)

    with server(answer) as a, server(answer) as b:
        client = client_of("openai", [a, b], HASTY)
        assert scored(client)[1] == Counter(foreign_token=0, nan_score=0)
        is_ill.set()
        with pytest.raises(StageError, match="no teacher server has answered for 0.5 s .*500 out of memory"):
            scored(client)


def test_where_every_answer_is_refused_the_run_ends_with_what_the_server_said():
    with (
        server(lambda path, body: (400, "max_logprobs is 5")) as url,
        pytest.raises(StageError, match="none of 8 rollouts .* 8 were refused by it.*max_logprobs is 5"),
    ):
        scored(client_of("openai", [url]))
