"""An engine that is lost, or that hangs: nobody waits for it for ever."""

import asyncio
from concurrent.futures.process import BrokenProcessPool

from opsd.teacher.remote.wire import unpack_score_request
from opsd.teacher.server.batcher import Batcher
from tests.opsd.teacher.server.stand_in import BODY, Engine, changed, wait_until


def batcher_of(engine, engine_timeout_s=60):
    bounds = {"max_merged_tokens": 100, "max_queued": 9, "engine_timeout_s": engine_timeout_s}
    return Batcher(engine.score, None, **bounds, on_batch=lambda _: None)


def test_an_engine_that_does_not_answer_in_time_is_lost():
    async def main():
        engine = Engine()  # is never let go
        batcher = batcher_of(engine, engine_timeout_s=0.05)
        work = asyncio.create_task(batcher.run())
        answer = asyncio.create_task(batcher.submit(unpack_score_request(BODY)))
        results = await asyncio.wait_for(asyncio.gather(answer, work, return_exceptions=True), timeout=60)
        assert [str(result) for result in results] == ["no answer within engine_timeout_s=0.05"] * 2
        assert all(isinstance(result, BrokenProcessPool) for result in results)

    asyncio.run(main())


def test_a_lost_engine_fails_every_request_that_waits_and_ends_the_work():
    async def main():
        engine = Engine()
        batcher = batcher_of(engine)
        work = asyncio.create_task(batcher.run())
        requests = [unpack_score_request(changed(top_k=k)) for k in (1, 2, 3)]
        answers = [asyncio.create_task(batcher.submit(request)) for request in requests]
        await wait_until(lambda: engine.calls and len(batcher) == 2)
        engine.error = BrokenProcessPool("gone")
        engine.go.set()
        results = await asyncio.wait_for(asyncio.gather(*answers, work, return_exceptions=True), timeout=60)
        assert all(isinstance(result, BrokenProcessPool) for result in results)

    asyncio.run(main())
