"""Requests to small real servers that fail on command: none is lost, none is repeated that must not be."""

import pickle
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import pytest

from opsd.config.http import HttpConfig
from opsd.errors import ConfigError, StageError
from opsd.teacher.remote.client import get_when_ready, token_of
from opsd.teacher.remote.transport import RequestFailed, Transport
from tests.opsd.teacher.served import serving

pytestmark = pytest.mark.slow  # its tests take more than ten seconds together: real servers and processes

QUICK = HttpConfig(backoff_s=0.01, max_backoff_s=0.05, give_up_after_s=60, start_timeout_s=60)
HASTY = replace(QUICK, give_up_after_s=0.3, start_timeout_s=0.3)


@contextmanager
def server(*statuses: int):
    """Answers with these, one a request, the last for ever; yields (its address, what it was asked)."""
    asked, lock, left = [], threading.Lock(), list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            with lock:
                asked.append((self.path, body, self.headers.get("authorization")))
                status = left.pop(0) if len(left) > 1 else left[0]
            if status == 0:  # dies in the middle of the answer
                self.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
                self.close_connection = True
                return
            self.send_response(status)
            text = f"said {status}".encode()
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    with serving(Handler) as url:
        yield url, asked


def as_it_is(response):
    return response


def closed_address() -> str:
    """Where nobody listens any more."""
    with server(200) as (url, _):
        return url


def test_requests_are_spread_over_the_servers():
    with server(200) as (a, asked_a), server(200) as (b, asked_b):
        transport = Transport([a, b], QUICK)
        futures = [transport.post("/score", as_it_is, content=str(i).encode()) for i in range(20)]
        assert all(future.result().text == "said 200" for future in futures)
        assert sorted(int(body) for _, body, _ in asked_a + asked_b) == list(range(20))
        assert asked_a and asked_b


@pytest.mark.parametrize("status", [500, 503, 429, 0])
def test_a_failed_request_is_repeated_elsewhere(status):
    with server(status) as (bad, asked_bad), server(200) as (good, asked_good):
        transport = Transport([bad, good], QUICK)
        futures = [transport.post("/score", as_it_is, content=str(i).encode()) for i in range(10)]
        assert all(future.result().text == "said 200" for future in futures)
        assert sorted(int(body) for _, body, _ in asked_good) == list(range(10))
        assert asked_bad


def test_a_server_that_is_gone_costs_no_request():
    with server(200) as (good, asked):
        futures = [Transport([closed_address(), good], QUICK).post("/score", as_it_is, content=b"x") for _ in range(3)]
        assert all(future.result().status_code == 200 for future in futures)
        assert len(asked) == 3


def test_a_server_that_recovers_is_asked_again():
    with server(503, 503, 503, 200) as (url, asked):
        assert Transport([url], QUICK).post("/score", as_it_is, content=b"x").result().text == "said 200"
        assert len(asked) == 4


def test_when_all_are_gone_the_message_names_each_and_why():
    with server(503) as (busy, asked):
        gone = closed_address()
        with pytest.raises(StageError, match="no teacher server has answered for 0.3 s") as caught:
            Transport([gone, busy], HASTY).post("/score", as_it_is, content=b"x").result()
        assert f"{gone}: ConnectError" in str(caught.value)
        assert f"{busy}: 503 said 503" in str(caught.value)
        assert len(asked) > 1


@pytest.mark.parametrize("status", [400, 401, 413, 422, 404])
def test_a_refusal_is_not_repeated(status):
    with server(status) as (a, asked_a), server(status) as (b, asked_b):
        with pytest.raises(StageError, match=f"/score refuses: {status} said {status}"):
            Transport([a, b], QUICK).post("/score", as_it_is, content=b"x").result()
        assert len(asked_a) + len(asked_b) == 1


def test_a_refusal_says_the_same_in_another_process():
    failed = pickle.loads(pickle.dumps(RequestFailed("teacher_refused", "too long")))
    assert (str(failed), failed.reason, failed.said) == ("score: too long", "teacher_refused", "too long")


def test_the_token_travels_from_the_environment_or_a_file(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("from-file\n")
    monkeypatch.setenv("TEACHER_TEST_TOKEN", "from-env")
    with server(200) as (url, asked):
        for cfg in (
            HttpConfig(token_env="TEACHER_TEST_TOKEN"),
            HttpConfig(token_env="TEACHER_TEST_TOKEN", token_file=str(tmp_path / "token")),
            HttpConfig(token_env="TEACHER_TEST_NO_TOKEN"),
        ):
            Transport([url], cfg, token_of(cfg)).post("/score", as_it_is, content=b"x").result()
        assert [token for _, _, token in asked] == ["Bearer from-env", "Bearer from-file", None]
    with pytest.raises(ConfigError, match=r"teacher\.http\.token_file=.*there is no such file"):
        token_of(HttpConfig(token_file=str(tmp_path / "none")))


def test_a_start_waits_for_a_server_that_still_loads():
    with server(503, 503, 200) as (url, asked):
        assert get_when_ready(url, "/info", QUICK, as_it_is).text == "said 200"
        assert len(asked) == 3


def test_a_start_does_not_wait_for_a_server_that_refuses_or_never_comes():
    with server(401) as (url, asked), pytest.raises(ConfigError, match="/info refuses: 401 said 401"):
        get_when_ready(url, "/info", HASTY, as_it_is)
    assert len(asked) == 1
    with pytest.raises(ConfigError, match="is not ready after 0.3 s: ConnectError"):
        get_when_ready(closed_address(), "/info", HASTY, as_it_is)
