"""Requests wait for the engine in a queue; those that fit together can be scored together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

from opsd.teacher.remote.wire import GenerateRequest, ScoreRequest
from opsd.teacher.server.limits import Refusal
from opsd.types import Rollout, TeacherScores

Request = ScoreRequest | GenerateRequest
Answer = list[TeacherScores] | list[Rollout]


@dataclass(frozen=True, kw_only=True, eq=False)
class Waiting:
    request: Request
    answer: asyncio.Future[Answer]

    def fits(self, other: Request) -> bool:
        """Whether one call of the engine can answer both."""
        own = self.request
        return (
            isinstance(own, ScoreRequest)
            and isinstance(other, ScoreRequest)
            and (own.top_k, own.vocabulary, own.with_hidden) == (other.top_k, other.vocabulary, other.with_hidden)
        )


class Batcher:
    """A queue before the engine. While the engine is busy requests gather; what fits together then goes as one.

    `max_merged_tokens` bounds such a call; 0: every request by itself. The engine still bounds what it computes at
    once (teacher.max_batch_tokens). One that has not answered after `engine_timeout_s` is lost.
    """

    def __init__(
        self,
        score: Callable[[ScoreRequest], Awaitable[list[TeacherScores]]],
        generate: Callable[[GenerateRequest], Awaitable[list[Rollout]]],
        *,
        max_merged_tokens: int,
        max_queued: int,
        engine_timeout_s: float,
        on_batch: Callable[[int], None],
    ) -> None:
        """`on_batch` is told how many requests each call of the engine answers."""
        self.score = score
        self.generate = generate
        self.max_merged_tokens = max_merged_tokens
        self.max_queued = max_queued
        self.engine_timeout_s = engine_timeout_s
        self.on_batch = on_batch
        self._queue: deque[Waiting] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._queue)

    async def submit(self, request: Request) -> Answer:
        """Raises Refusal 503 where the queue is full, and whatever the engine raises."""
        if len(self._queue) >= self.max_queued:
            raise Refusal(503, f"{len(self._queue)} requests are waiting already: come back later")
        waiting = Waiting(request=request, answer=asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def run(self) -> None:
        """Answers requests. Ends with BrokenProcessPool, as every request that waits, where the engine is lost."""
        while True:
            await self._arrived.wait()
            batch = self._take()
            if not self._queue:
                self._arrived.clear()
            self.on_batch(len(batch))
            error = await self._answer(batch)
            if isinstance(error, BrokenProcessPool):
                for waiting in self._queue:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                raise error

    def _take(self) -> list[Waiting]:
        """The request that has waited longest, and those of the others that fit to it."""
        batch = [self._queue.popleft()]
        num_tokens = batch[0].request.num_tokens
        for waiting in list(self._queue):
            if waiting.fits(batch[0].request) and num_tokens + waiting.request.num_tokens <= self.max_merged_tokens:
                num_tokens += waiting.request.num_tokens
                self._queue.remove(waiting)
                batch.append(waiting)
        return batch

    async def _answer(self, batch: list[Waiting]) -> BaseException | None:
        """Every request gets its part of what the engine returns, or the error that it raises, which is returned."""
        first = batch[0].request
        call: asyncio.Future[list[Rollout]] | asyncio.Future[list[TeacherScores]]
        if isinstance(first, GenerateRequest):
            call = asyncio.ensure_future(self.generate(first))
        else:
            requests = [waiting.request for waiting in batch if isinstance(waiting.request, ScoreRequest)]
            rollouts = [rollout for request in requests for rollout in request.rollouts]
            call = asyncio.ensure_future(self.score(replace(first, rollouts=rollouts)))
        answered, _ = await asyncio.wait([call], timeout=self.engine_timeout_s)
        late = BrokenProcessPool(f"no answer within engine_timeout_s={self.engine_timeout_s:g}")
        error, start = (call.exception() if answered else late), 0
        for waiting in batch:
            stop = start + len(waiting.request.prompts)
            if waiting.answer.cancelled():  # the client has gone
                pass
            elif error is not None:
                waiting.answer.set_exception(error)
            else:
                waiting.answer.set_result(call.result()[start:stop])
            start = stop
        return error
