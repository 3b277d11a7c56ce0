"""Connections that ask nothing, never end their request or never take their answer; the others are served meanwhile."""

import asyncio
import logging
import resource
import socket
import threading
import time
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest

from opsd.errors import ConfigError
from opsd.teacher.server.connections import BACKLOG, OTHER_FILES, allow_files
from tests.opsd.teacher.server.stand_in import BODY, Engine, listening, service_of

pytestmark = pytest.mark.slow  # its tests take more than ten seconds together: real servers and processes

HEADERS = b"POST /score HTTP/1.1\r\nhost: a\r\n"
SLOW_S = 0.8  # what the server allows, in tests of its patience


async def scored_at_once(request):
    engine = Engine()
    engine.go.set()
    return await engine.score(request)


@pytest.fixture
def clients():
    """connect(url, bytes to send) -> a socket; closed with the test."""
    with ExitStack() as stack:

        def connect(url, said=b""):
            parts = urlsplit(url)
            client = stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=60))
            client.sendall(said)
            return client

        yield connect


def heard(client):
    """All that comes until the server ends the connection."""
    said = bytearray()
    try:
        while part := client.recv(1 << 16):
            said += part
    except ConnectionError:  # it has not read all that it was sent
        pass
    return bytes(said)


def eventually(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_three_thousand_connections_that_ask_nothing_keep_nobody_out(clients):
    service = service_of(scored_at_once)
    with listening(service, connections=8) as (url, dropped):
        for _ in range(10):
            idle = [clients(url) for _ in range(300)]
            assert httpx.post(f"{url}/score", content=BODY).status_code == 200
            for client in idle[:200]:
                client.close()
        eventually(lambda: service.metrics.connections.collect()[0].samples[0].value <= 8)
        assert set(dropped) == {"evicted"} and len(dropped) > 1000


def test_who_has_asked_is_not_sent_away_for_a_newcomer(clients):
    go = threading.Event()

    async def score(request):
        await asyncio.to_thread(go.wait)
        return await scored_at_once(request)

    service = service_of(score)
    with listening(service, connections=2) as (url, dropped):
        whole = HEADERS + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(BODY) + BODY
        asking = [clients(url, whole), clients(url, whole)]
        eventually(lambda: service.intake.held_bytes == 2 * len(BODY))
        refused = httpx.get(f"{url}/health")
        assert (refused.status_code, list(refused.json())) == (503, ["error"])
        go.set()
        assert all(heard(client).startswith(b"HTTP/1.1 200") for client in asking)
        assert dropped == ["full"]
        eventually(lambda: httpx.get(f"{url}/health").status_code == 200)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"POST /sco",
        HEADERS,
        HEADERS + b"content-length: 100\r\n\r\nhalf",
        HEADERS + b"transfer-encoding: chunked\r\n\r\n4\r\nhalf",
    ],
)
def test_a_request_that_is_never_whole_ends_and_holds_nobody(clients, said):
    service = service_of(scored_at_once)
    with listening(service, transfer_s=SLOW_S) as (url, dropped):
        slow = clients(url, said)
        assert httpx.post(f"{url}/score", content=BODY).status_code == 200
        answer = heard(slow)
        assert answer.startswith(b"HTTP/1.1 408") and f"no whole request within {SLOW_S} s".encode() in answer
        assert dropped == ["slow"]
        eventually(lambda: service.intake.held_bytes == 0)


def test_a_byte_now_and_then_buys_no_time(clients):
    """Nor does one after a refusal, for which the server needed no body."""
    service = service_of(scored_at_once, token="s3cret")
    with listening(service, transfer_s=SLOW_S) as (url, dropped):
        head = HEADERS + b"transfer-encoding: chunked\r\n\r\n"
        dripping = clients(url, head)
        with pytest.raises(ConnectionError):
            for _ in range(10_000):
                dripping.sendall(b"1\r\nx\r\n")
                time.sleep(0.01)
        assert dropped == ["slow"]


def test_an_answer_that_nobody_takes_ends_with_its_connection(clients):
    """20 MB, more than the system keeps for a reader."""
    service = service_of(scored_at_once, tokens=("x" * 1000,) * 20_000)
    with listening(service, transfer_s=SLOW_S) as (url, dropped):
        deaf = clients(url, b"GET /vocabulary HTTP/1.1\r\nhost: a\r\n\r\n")
        eventually(lambda: dropped == ["slow"])
        assert len(heard(deaf)) < 20_000_000
        assert httpx.post(f"{url}/score", content=BODY).status_code == 200


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),  # the beginning of TLS
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"404"),
        (b"GET /health HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 300_000, b"400"),
        (HEADERS + b"content-length: -1\r\n\r\n", b"400"),
        (HEADERS + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", b"400"),
        (HEADERS + b"transfer-encoding: chunked\r\n\r\nno length\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),  # no host
        (b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: upgrade, close\r\nupgrade: websocket\r\n\r\n", b"200"),
    ],
)
def test_what_is_no_request_of_ours_is_answered_and_nothing_is_logged(clients, caplog, said, status):
    caplog.set_level(logging.DEBUG, "asyncio")
    with listening(service_of(scored_at_once)) as (url, _):
        assert heard(clients(url, said)).startswith(b"HTTP/1.1 " + status)
        assert httpx.post(f"{url}/score", content=BODY).status_code == 200
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_body_that_breaks_after_its_refusal_is_no_fault_of_the_server(clients, caplog):
    with listening(service_of(scored_at_once, token="s3cret")) as (url, _):
        client = clients(url, HEADERS + b"transfer-encoding: chunked\r\n\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 401")
        client.sendall(b"no length\r\n")
        heard(client)
        assert httpx.get(f"{url}/health").status_code == 200
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_more_connections_than_files_are_refused_and_fewer_get_theirs(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1000))
    allowed = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: allowed.append(limits))
    with pytest.raises(ConfigError, match=r"max_connections=617 needs 1001 open files, and this process may have 1000"):
        allow_files(1001 - BACKLOG - OTHER_FILES)
    allow_files(1000 - BACKLOG - OTHER_FILES)
    assert allowed == [(1000, 1000)]
