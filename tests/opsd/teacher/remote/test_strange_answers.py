"""What is no teacher's answer: one line that names the address where a run starts, a dropped answer where it runs."""

import gzip
import json
import logging
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest

from opsd.config.engine import TeacherConfig
from opsd.config.http import HttpConfig
from opsd.errors import ConfigError, StageError
from opsd.teacher.facts import teacher_facts
from opsd.teacher.remote.client import get_when_ready, plain
from opsd.teacher.remote.http import served_info
from opsd.teacher.remote.openai import served_model
from opsd.teacher.remote.transport import Transport
from opsd.teacher.remote.wire import pack_scores
from tests.opsd.teacher.served import serving
from tests.opsd.teacher.server.test_bad_requests import INFO, ITEMS, MODELS, client_of, frame_server, scored, server

pytestmark = pytest.mark.slow  # its tests take more than ten seconds together: real servers and processes

HASTY = HttpConfig(backoff_s=0.01, max_backoff_s=0.05, give_up_after_s=0.3, start_timeout_s=0.3)
HTML = "<!doctype html><title>Sign in</title>"


@contextmanager
def answering(body, content_type="text/html", **headers):
    """200 and the same body to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            said = body if isinstance(body, bytes) else body.encode()
            self.send_response(200)
            self.send_header("content-type", content_type)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with serving(Handler) as url:
        yield url


def config(url, backend="http"):
    return TeacherConfig(backend=backend, urls=[url], http=HASTY)


INFO_SAYS = {
    "html": (HTML, "JSONDecodeError: .*; it begins '<!doctype html>"),
    "half a JSON": (json.dumps(INFO)[:40], "JSONDecodeError"),
    "nothing": ("", "JSONDecodeError"),
    "bytes": (b"\xff\xfe\x00\x01" * 99, "Error"),
    "a list": ("[1, 2]", "expected a JSON object with a protocol"),
    "deep": ("[" * 100_000, "RecursionError|JSONDecodeError"),
    "a long number": ('{"protocol": ' + "9" * 5000 + "}", "ValueError"),
    "another service": ('{"status": "ok"}', "expected a JSON object with a protocol"),
    "another protocol": (json.dumps({**INFO, "protocol": 1}), "speaks protocol 1, expected"),
    "a limit missing": (json.dumps({**INFO, "max_tokens": None}), "expected max_tokens as int, got None"),
    "a limit of text": (json.dumps({**INFO, "max_top_k": "64"}), "expected max_top_k as int, got '64'"),
}  # fmt: skip


@pytest.mark.parametrize("says", INFO_SAYS)
def test_a_server_that_says_something_else_of_itself_is_refused_in_one_line(says):
    body, said = INFO_SAYS[says]
    with answering(body) as url, pytest.raises(ConfigError, match=said) as caught:
        served_info(config(url))
    assert str(caught.value).startswith(f"teacher.urls: {url}") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body", [HTML, "{}", '{"data": []}', '{"data": [{"id": 3, "max_model_len": 64}]}', '{"data": [{"id": "a"}]}', "[]"]
)
def test_a_list_of_models_that_is_none_is_refused_in_one_line(body):
    with answering(body) as url, pytest.raises(ConfigError, match="is not what this run expects there") as caught:
        served_model(config(url, "openai"))
    assert f"{url}/v1/models" in str(caught.value) and "\n" not in str(caught.value)
    with answering(json.dumps(MODELS)) as url:
        assert served_model(config(url, "openai")) == MODELS["data"][0]


def test_a_vocabulary_that_is_none_is_refused_in_one_line():
    """The same body at /info and /vocabulary: an object, which is no list."""
    with answering(json.dumps(INFO)) as url, pytest.raises(ConfigError, match="/vocabulary is not .* a JSON list"):
        teacher_facts(replace(config(url), top_k=8), "teacher")


def test_what_is_not_packed_as_it_says_is_waited_for_and_then_named():
    with answering(b"no gzip", content_encoding="gzip") as url:
        with pytest.raises(ConfigError, match="is not ready after 0.3 s: DecodingError"):
            served_info(config(url))
        with pytest.raises(StageError, match="no teacher server has answered for 0.3 s .*DecodingError"):
            Transport([url], HASTY).post("/score", lambda response: response, content=b"x").result()
    with answering(gzip.compress(json.dumps(INFO).encode()), content_encoding="gzip") as url:
        assert served_info(config(url))["vocab_size"] == INFO["vocab_size"]


def test_an_answer_that_never_ends_is_given_up_after_its_time():
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.send_header("content-length", "1000000")
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            except ConnectionError:
                pass

        def log_message(self, *_):
            pass

    with serving(Handler) as url:
        transport = Transport([url], replace(HASTY, timeout_s=0.2))
        with pytest.raises(StageError, match=r"no whole answer within 0.2 s"):
            transport.post("/score", lambda response: response, content=b"x").result()


def changed(**arrays):
    """The scores of the second of ITEMS (3 tokens), with other arrays; None: without it."""
    scores = replace(ITEMS[1].scores, **arrays)
    return pack_scores([scores], with_candidates=False)


WRONG = {
    "html": HTML,
    "half a frame": changed()[:-5],
    "of other rollouts": pack_scores([ITEMS[0].scores], with_candidates=False),
    "of fewer top k": changed(top_ids=ITEMS[1].scores.top_ids[:, :3], top_logprobs=ITEMS[1].scores.top_logprobs[:, :3]),
    "an id beyond the vocabulary": changed(top_ids=np.full_like(ITEMS[1].scores.top_ids, 40)),
    "an id below -1": changed(top_ids=np.full_like(ITEMS[1].scores.top_ids, -2)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_scores_of_another_question_are_dropped_and_counted(wrong):
    with server(frame_server({1: (200, WRONG[wrong])})) as url:
        usable, dropped = scored(client_of("http", [url]))
    assert dropped["teacher_error"] == 1 and dropped.total() == 1
    assert [item.rollout for item in usable] == [item.rollout for place, item in enumerate(ITEMS) if place != 1]


def test_requests_leave_no_line_on_the_terminal(caplog):
    """At INFO, the level that Hydra gives every logger."""
    caplog.set_level(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.NOTSET)
    with server(frame_server({})) as url:
        scored(client_of("http", [url]))
        get_when_ready(url, "/info", HASTY, lambda response: response)
    assert [record.name for record in caplog.records if record.name.startswith("http")] == []


def test_what_a_server_says_cannot_steer_a_terminal():
    assert plain("no\r\n\x1b[2J\x07room \u202e here") == "no [2Jroom  here"
    assert len(plain("x" * 10_000)) == 500
