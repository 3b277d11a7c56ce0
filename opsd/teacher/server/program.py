"""The program behind `python -m opsd.teacher.server`: checks, the engine's process, and the HTTP service."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from transformers import PreTrainedConfig

from opsd.config.auto import resolve_device, with_dtypes
from opsd.config.engine import TeacherConfig, scores_candidates, teacher_spec
from opsd.config.run import compose_config
from opsd.config.secrets import read_token
from opsd.config.setting_names import refuse_misspelt
from opsd.engines.installed import require_vllm
from opsd.errors import ConfigError, DataError, StageError, reported
from opsd.models.facts import ModelFacts, read_facts, tokens_digest, weights_fingerprint
from opsd.models.folder import model_config, text_setting
from opsd.models.tensor_parallel import check_engine_heads
from opsd.models.weights import check_weights
from opsd.teacher.remote.frames import PROTOCOL
from opsd.teacher.server.app import Service, make_app
from opsd.teacher.server.batcher import Batcher
from opsd.teacher.server.config import ServerConfig
from opsd.teacher.server.connections import ConnectionLimits, allow_files, http_server
from opsd.teacher.server.engine_process import EngineProcess
from opsd.teacher.server.intake import Intake
from opsd.teacher.server.limits import Limits
from opsd.teacher.server.metrics import ServerMetrics
from opsd.types import Vocabulary


def serve(cfg: ServerConfig) -> None:
    """Serves until SIGTERM or SIGINT. Raises ConfigError, StageError where the engine ended by itself."""
    token = read_token("", cfg.token_file, cfg.token_env)
    cfg.check_token(token)
    require_vllm({"teacher": cfg.teacher.backend})
    device = resolve_device(cfg.device)
    cfg = with_dtypes(cfg, device)
    facts = read_facts("teacher.path", cfg.teacher.path, cfg.teacher.trust_remote_code)
    config = model_config("teacher.path", cfg.teacher.path, cfg.teacher.trust_remote_code)
    check_engine_heads("teacher", cfg.teacher, cfg.teacher.path, config)
    check_weights("teacher.path", cfg.teacher.path, cfg.teacher.trust_remote_code)
    limits = limits_of(cfg, facts, hidden_bytes=hidden_bytes(cfg.teacher, config))
    stop_ids = sorted({index for index in facts.stop_ids if index < facts.vocab_size})
    vocabulary = Vocabulary(size=facts.vocab_size, stop_ids=tuple(stop_ids))  # until a request brings its own
    spec = teacher_spec(cfg.teacher, vocabulary=vocabulary, device=device, max_model_tokens=limits.model_tokens)
    engine = EngineProcess(spec)
    metrics = ServerMetrics()
    batcher = Batcher(
        engine.score,
        engine.generate,
        max_merged_tokens=cfg.max_merged_tokens,
        max_queued=cfg.max_queued,
        engine_timeout_s=cfg.engine_timeout_s,
        on_batch=metrics.batch.observe,
    )
    metrics.queue_length.set_function(batcher.__len__)
    intake = Intake(limits, cfg.max_held_mib * 2**20)
    metrics.held_bytes.set_function(lambda: intake.held_bytes)
    service = Service(batcher=batcher, limits=limits, intake=intake, metrics=metrics, tokens=facts.tokens, token=token)
    allow_files(cfg.max_connections)
    listener = listen(cfg.host, cfg.port)
    try:
        asyncio.run(run(cfg, service, engine, facts, listener))
    finally:
        engine.stop()


async def run(
    cfg: ServerConfig, service: Service, engine: EngineProcess, facts: ModelFacts, listener: socket.socket
) -> None:
    """Answers from the first moment on; the model is loaded meanwhile."""
    connection_limits = ConnectionLimits(
        connections=cfg.max_connections,
        transfer_s=cfg.transfer_timeout_s,
        on_drop=lambda reason: service.metrics.dropped.labels(reason).inc(),
    )
    server = http_server(make_app(service), connection_limits)
    service.metrics.connections.set_function(lambda: len(server.server_state.connections))

    async def load_and_work() -> None:
        await engine.start()
        service.info = info_of(cfg, facts, service.limits, engine.spec.device)
        service.metrics.ready.set(1)
        print(f"ready {address(listener)}", file=sys.stderr, flush=True)
        await service.batcher.run()

    def stop_server(_: asyncio.Task) -> None:
        server.should_exit = True

    work = asyncio.create_task(load_and_work())
    work.add_done_callback(stop_server)  # it ends only where loading fails or the engine is lost
    print(f"listening {address(listener)}", file=sys.stderr, flush=True)
    await server.serve(sockets=[listener])
    if work.done():
        error = work.exception()
        if isinstance(error, (ConfigError, DataError, StageError)):
            raise error
        raise StageError(f"the teacher's engine failed: {error}") from error
    work.cancel()


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, ValueError, TypeError) as error:  # the latter two: a host that no address can be
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"host={host} port={port}: cannot listen there: {reason}") from error


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def hidden_bytes(teacher: TeacherConfig, config: PreTrainedConfig) -> int:
    """Of the hidden state of one token; 0 where this engine returns none."""
    if not teacher.can.returns_hidden or teacher.scoring != "rows":
        return 0
    return (2 if teacher.dtype == "bfloat16" else 4) * text_setting(teacher.path, config, "hidden_size")


def limits_of(cfg: ServerConfig, facts: ModelFacts, *, hidden_bytes: int) -> Limits:
    return Limits(
        body_bytes=cfg.max_body_mib * 2**20,
        answer_bytes=cfg.max_answer_mib * 2**20,
        rollouts=cfg.max_rollouts,
        tokens=cfg.max_tokens,
        model_tokens=min(cfg.max_model_tokens, facts.max_position_embeddings),
        top_k=min(cfg.teacher.top_k, facts.vocab_size),
        candidates=min(cfg.max_candidates, facts.vocab_size),
        vocab_size=facts.vocab_size,
        hidden_bytes=hidden_bytes,
    )


def info_of(cfg: ServerConfig, facts: ModelFacts, limits: Limits, device: str) -> dict:
    """What a client must know; servers of one run must agree in all of it."""
    return {
        "protocol": PROTOCOL,
        "backend": cfg.teacher.backend,
        "dtype": cfg.teacher.dtype,
        "vocab_size": facts.vocab_size,
        "stop_ids": list(facts.stop_ids),
        "tokens_sha256": tokens_digest(facts.tokens),
        "weights_sha256": weights_fingerprint(cfg.teacher.path),
        "scores_candidates": scores_candidates(cfg.teacher),
        "max_model_tokens": limits.model_tokens,
        "max_top_k": limits.top_k,
        "max_rollouts": limits.rollouts,
        "max_tokens": limits.tokens,
        "max_body_bytes": limits.body_bytes,
        "max_answer_bytes": limits.answer_bytes,
        "hidden_bytes": limits.hidden_bytes,
    }


@hydra.main(version_base=None, config_path="pkg://opsd.conf", config_name="teacher_server")
def main(hydra_cfg: DictConfig) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # after uvicorn's own handler: the engine is ended, too
    with reported():
        serve(compose_config(hydra_cfg, ServerConfig))


def launch() -> None:
    """The program: the command line's settings -> a server. Ends with exit code 2 and one line where they are wrong."""
    ConfigStore.instance().store(name="teacher_server_schema", node=ServerConfig)
    with reported():
        refuse_misspelt(sys.argv[1:], ServerConfig, "opsd.conf")
    main()
