"""A teacher's HTTP side for tests, with a stand-in for the engine's process."""

import asyncio
import threading
from contextlib import contextmanager

import numpy as np

from opsd.teacher.remote.frames import from_frame, to_frame
from opsd.teacher.remote.wire import pack_score_request
from opsd.teacher.server.app import Service, make_app
from opsd.teacher.server.batcher import Batcher
from opsd.teacher.server.connections import ConnectionLimits, http_server
from opsd.teacher.server.intake import Intake
from opsd.teacher.server.limits import Limits
from opsd.teacher.server.metrics import ServerMetrics
from opsd.teacher.server.program import address, listen
from opsd.types import TeacherScores, Vocabulary
from tests.opsd.builders import scored_rollouts

VOCABULARY = Vocabulary(size=40, stop_ids=(0,))
ROLLOUTS = [item.rollout for item in scored_rollouts([3, 4, 5], VOCABULARY, top_k=4)]
BODY = pack_score_request(ROLLOUTS, 4, VOCABULARY, with_candidates=False)
LIMITS = Limits(
    body_bytes=4096, answer_bytes=1000, rollouts=4, tokens=60, model_tokens=12, top_k=8, candidates=5, vocab_size=44,
    hidden_bytes=0,
)  # fmt: skip


class Engine:
    """Scores a token with its own id, when it is let go; remembers how many rollouts came in each call."""

    def __init__(self):
        self.calls, self.go, self.error = [], asyncio.Event(), None

    async def score(self, request):
        self.calls.append(len(request.rollouts))
        await self.go.wait()
        if self.error:
            raise self.error
        return [
            TeacherScores(
                top_ids=np.full((len(r), request.top_k), -1, np.int32),
                top_logprobs=np.zeros((len(r), request.top_k), np.float32),
                sampled_logprobs=r.response_ids.astype(np.float32),
                candidate_logprobs=None,
            )
            for r in request.rollouts
        ]


def service_of(
    score, generate=None, *, limits=LIMITS, token="", max_held_bytes=10**6, info=None, tokens=("a",), **queue
):
    """`score`, `generate`: the engine's; `queue`: how its Batcher differs."""
    metrics = ServerMetrics()
    settings = {"max_merged_tokens": 1000, "max_queued": 8, "engine_timeout_s": 60, "on_batch": metrics.batch.observe}
    batcher = Batcher(score, generate, **{**settings, **queue})
    intake = Intake(limits, max_held_bytes)
    return Service(
        batcher=batcher, limits=limits, intake=intake, metrics=metrics, tokens=tokens, token=token, info=info or {}
    )


@contextmanager
def listening(service, *, connections=64, transfer_s=60.0):
    """The service behind a real socket, in a thread. Yields (its address, why it has ended connections so far)."""
    dropped = []
    limits = ConnectionLimits(connections=connections, transfer_s=transfer_s, on_drop=dropped.append)
    server, listener = http_server(make_app(service), limits), listen("127.0.0.1", 0)
    service.metrics.connections.set_function(lambda: len(server.server_state.connections))

    async def main():
        work = asyncio.create_task(service.batcher.run())
        await server.serve(sockets=[listener])
        work.cancel()

    url = address(listener)
    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    try:
        yield url, dropped
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        assert not thread.is_alive()


async def wait_until(holds):
    while not holds():
        await asyncio.sleep(0.001)


def changed(**arrays) -> bytes:
    return to_frame({**from_frame(BODY), **{name: np.array(value, np.int32) for name, value in arrays.items()}})
