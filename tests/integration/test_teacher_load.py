"""Two minutes of 64 clients at a real server, one of them stalled in mid-body; prints how long answers took.

    pytest -s -m long tests/integration/test_teacher_load.py

Its sibling of a second, with the engine in a thread: tests/opsd/teacher/server/test_hostile.py.
"""

import asyncio
import os
import socket
import time
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.engines.transformers import TransformersEngine
from opsd.teacher.remote.wire import pack_score_request, unpack_scores
from opsd.types import Vocabulary
from tests.opsd.builders import scored_rollouts
from tests.teacher_servers import TOKEN, make_models, teacher_server

pytestmark = pytest.mark.long
NUM_CLIENTS, TOP_K = 64, 8
SECONDS = float(os.environ.get("OPSD_LOAD_S", 120))
VOCABULARY = Vocabulary(size=40, stop_ids=(0,))
ROLLOUTS = [item.rollout for item in scored_rollouts([1 + n % 23 for n in range(48)], VOCABULARY, top_k=5, seed=3)]
FRAMES = [pack_score_request([rollout], TOP_K, VOCABULARY, with_candidates=True) for rollout in ROLLOUTS]
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
FIELDS = ("top_ids", "top_logprobs", "sampled_logprobs", "candidate_logprobs")


def direct_scores(path):
    """Of each rollout by itself, as the server scores a request of one."""
    config = TeacherConfig(path=str(path), backend="transformers", top_k=TOP_K)
    engine = TransformersEngine(teacher_spec(config, vocabulary=VOCABULARY, device="cpu", max_model_tokens=100))
    return [engine.score([rollout], TOP_K)[0] for rollout in ROLLOUTS]


async def ask(url, wanted, number, until, waits_s):
    async with httpx.AsyncClient(timeout=60, headers=HEADERS, trust_env=False, verify=False) as client:
        turn = 0
        while time.monotonic() < until:
            place = (number * 7 + turn * 13) % len(FRAMES)
            began = time.monotonic()
            answer = await client.post(f"{url}/score", content=FRAMES[place])
            waits_s.append(time.monotonic() - began)
            assert answer.status_code == 200, answer.text
            [scores] = unpack_scores(answer.content, [len(ROLLOUTS[place])])
            for name in FIELDS:
                np.testing.assert_array_equal(getattr(scores, name), getattr(wanted[place], name))
            turn += 1


def test_every_answer_of_two_minutes_is_that_of_its_own_question(tmp_path):
    make_models(tmp_path)
    wanted = direct_scores(tmp_path / "teacher")
    waits_s = []
    with teacher_server(
        tmp_path / "teacher", f"teacher.top_k={TOP_K}", "transfer_timeout_s=600", token=TOKEN
    ) as server:
        parts = urlsplit(server.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as stalled:
            head = f"POST /score HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {TOKEN}\r\n"
            head += f"content-length: {len(FRAMES[0])}\r\n\r\n"
            stalled.sendall(head.encode() + FRAMES[0][:100])

            async def all_at_once():
                until = time.monotonic() + SECONDS
                await asyncio.gather(*(ask(server.url, wanted, n, until, waits_s) for n in range(NUM_CLIENTS)))

            asyncio.run(all_at_once())
            stalled.sendall(FRAMES[0][100:])
            assert stalled.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert server.process.poll() is None
        assert not any("Traceback" in line for line in server.output), "".join(server.output)
    assert len(waits_s) > NUM_CLIENTS
    columns = {"clients": NUM_CLIENTS, "s": SECONDS, "answers": len(waits_s)}
    columns |= {f"p{p} ms": round(1000 * float(np.percentile(waits_s, p))) for p in (50, 90, 99, 100)}
    print(
        "",
        *(f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), columns.values())),
        sep="\n",
    )
