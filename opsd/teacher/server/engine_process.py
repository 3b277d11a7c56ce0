"""The server's engine in a process of its own: a long scoring pass never keeps the server from answering."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

from opsd.config.engine import EngineSpec
from opsd.engines.groups import in_order
from opsd.engines.lifetime import end_with_parent
from opsd.engines.vllm import engine_environment
from opsd.engines.worker import EngineWorker
from opsd.teacher.remote.wire import GenerateRequest, ScoreRequest
from opsd.types import Rollout, TeacherScores


class EngineProcess:
    """The engine that a TeacherPool's worker holds, behind three coroutines. Its errors come out of them."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._executor = ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))

    async def start(self) -> None:
        """Loads the model."""
        config = self.spec.config
        # The child's, before it imports torch.
        os.environ.update(engine_environment(config, self.spec.device))
        await self._run(_start, self.spec)

    async def score(self, request: ScoreRequest) -> list[TeacherScores]:
        return await self._run(_score, request)

    async def generate(self, request: GenerateRequest) -> list[Rollout]:
        return await self._run(_generate, request)

    def stop(self) -> None:
        """Ends the process, in the middle of its work if need be."""
        for process in multiprocessing.active_children():
            process.kill()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function, *args):
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)


_worker = EngineWorker()  # the child's; the server's own stays empty


def _start(spec: EngineSpec) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    end_with_parent()
    _worker.start(spec)


def _score(request: ScoreRequest) -> list[TeacherScores]:
    _worker.engine.vocabulary = request.vocabulary  # of the client's run, as whether it wants hidden states
    _worker.engine.returns_hidden = request.with_hidden
    return _worker.engine.score(request.rollouts, request.top_k)


def _generate(request: GenerateRequest) -> list[Rollout]:
    _worker.engine.vocabulary = request.vocabulary
    requests = [(prompt, 0, seed) for prompt, seed in zip(request.prompts, request.seeds, strict=True)]
    return in_order(_worker.engine.generate(requests, request.sampling, 0, None))
