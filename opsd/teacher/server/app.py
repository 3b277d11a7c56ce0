"""The teacher server's HTTP side: who may ask, what, and in which form it is answered.

    GET  /health      200 while the process answers at all          GET  /info        what is served, as JSON
    GET  /ready       200 once the engine answers, else 503         GET  /vocabulary  its tokens by id, as JSON
    GET  /metrics     Prometheus                                    POST /score, /generate   frames, see wire.py

A refusal is JSON {"error": "one sentence"}. All but the first two ask for the token where the server has one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from opsd.teacher.remote.frames import MEDIA_TYPE
from opsd.teacher.remote.wire import (
    GenerateRequest,
    ScoreRequest,
    pack_answers,
    pack_scores,
    unpack_generate_request,
    unpack_score_request,
)
from opsd.teacher.server.batcher import Batcher
from opsd.teacher.server.intake import Intake
from opsd.teacher.server.limits import Limits, Refusal
from opsd.teacher.server.metrics import ServerMetrics
from opsd.types import Rollout, TeacherScores

MOST_SAID = 500  # characters of a refusal: some quote what came


@dataclass(kw_only=True)
class Service:
    """What the routes work with."""

    batcher: Batcher
    limits: Limits
    intake: Intake
    metrics: ServerMetrics
    tokens: tuple[str | None, ...]
    token: str  # that a client must send; empty: none
    info: dict[str, Any] | None = None  # None: the model is still loading


def make_app(service: Service) -> FastAPI:
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(Refusal, refuse(service.metrics))
    app.add_exception_handler(HTTPException, refuse_route)
    allowed = [Depends(check_token(service.token))]

    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse("ok")

    @app.get("/ready")
    async def ready() -> Response:
        check_ready(service)
        return PlainTextResponse("ready")

    @app.get("/metrics", dependencies=allowed)
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/info", dependencies=allowed)
    async def info() -> Response:
        check_ready(service)
        return JSONResponse(service.info)

    @app.get("/vocabulary", dependencies=allowed)
    async def vocabulary() -> Response:
        return JSONResponse(service.tokens)

    @app.post("/score", dependencies=allowed)
    async def score(request: Request) -> Response:
        def pack(asked: ScoreRequest, scores: list[TeacherScores]) -> bytes:
            return pack_scores(scores, with_candidates=asked.with_candidates)

        return await serve(service, request, unpack_score_request, service.limits.check_score, pack)

    @app.post("/generate", dependencies=allowed)
    async def generate(request: Request) -> Response:
        def pack(asked: GenerateRequest, answers: list[Rollout]) -> bytes:
            return pack_answers(answers)

        return await serve(service, request, unpack_generate_request, service.limits.check_generate, pack)

    return app


async def serve(service: Service, request: Request, unpack: Callable, check: Callable, pack: Callable) -> Response:
    """Body -> request -> queue -> engine -> answer's body. Packing runs beside the event loop: it copies megabytes."""
    check_ready(service)
    endpoint = request.url.path
    async with service.intake.body(request) as body:
        began = time.perf_counter()
        try:
            asked = await run_in_threadpool(unpack, body)
        except ValueError as error:  # WireError, or a record's own check
            raise Refusal(400, str(error)[:MOST_SAID]) from error
        await run_in_threadpool(check, asked)
        try:
            answer = await service.batcher.submit(asked)
        except BrokenProcessPool as error:
            raise Refusal(503, "the engine's process has ended; so does this server") from error
        frame = await run_in_threadpool(pack, asked, answer)
    service.metrics.requests.labels(endpoint).inc()
    service.metrics.rollouts.labels(endpoint).inc(len(asked.prompts))
    service.metrics.tokens.labels(endpoint).inc(asked.num_tokens)
    service.metrics.latency.labels(endpoint).observe(time.perf_counter() - began)
    return Response(frame, media_type=MEDIA_TYPE)


def check_ready(service: Service) -> None:
    if service.info is None:
        raise Refusal(503, "the model is still loading")


def check_token(token: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency that raises Refusal 401 unless the request brings the token. Takes as long for any wrong one."""
    expected = f"Bearer {token}".encode()

    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if token and not secrets.compare_digest(given, expected):
            raise Refusal(401, "wrong or missing bearer token")

    return check


def refuse(metrics: ServerMetrics) -> Callable:
    async def handle(request: Request, refusal: Refusal) -> Response:
        metrics.refusals.labels(request.url.path, refusal.status).inc()  # a route's path: nothing else refuses
        headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(refusal.status)
        return JSONResponse({"error": refusal.reason}, status_code=refusal.status, headers=headers)

    return handle


async def refuse_route(_: Request, error: Any) -> Response:
    """404 and 405 (an HTTPException), in the form of every other refusal.

    Not counted: their paths are whatever a client makes up.
    """
    return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=error.headers)
