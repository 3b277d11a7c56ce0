"""The server's own engine process, in a thread of the test in its place: a tiny model, and no start of a process."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from opsd.config.engine import TeacherConfig, teacher_spec
from opsd.teacher.server import engine_process
from opsd.teacher.server.engine_process import EngineProcess
from opsd.teacher.server.limits import Limits
from opsd.types import Vocabulary
from tests.opsd.teacher.server.stand_in import listening, service_of
from tests.tiny_models import make_tiny_qwen3

WIDTH, VOCAB_SIZE, TOP_K = 64, 64, 8
LIMITS = Limits(
    body_bytes=1 << 20, answer_bytes=1 << 22, rollouts=64, tokens=2000, model_tokens=60, top_k=TOP_K, candidates=16,
    vocab_size=VOCAB_SIZE, hidden_bytes=4 * WIDTH,
)  # fmt: skip


@contextmanager
def serving_engine(folder, **settings):
    """Yields as `serving` does."""
    make_tiny_qwen3(folder, tied=False, width=WIDTH, vocab_size=VOCAB_SIZE, seed=1, eos_token_id=0, scale=2.0)
    config = TeacherConfig(path=str(folder), backend="transformers", top_k=TOP_K)
    own = Vocabulary(size=VOCAB_SIZE, stop_ids=(0,))
    spec = teacher_spec(config, vocabulary=own, device="cpu", max_model_tokens=LIMITS.model_tokens)
    with serving(spec, LIMITS, **settings) as found:
        yield found


@contextmanager
def serving(spec, limits, **settings):
    """Yields (its address, the engine's score function: (ScoreRequest) -> list[TeacherScores])."""
    process = EngineProcess(spec)
    with ThreadPoolExecutor(max_workers=1) as executor:
        process._executor = executor
        executor.submit(engine_process._worker.start, process.spec).result()
        bounds = {"max_merged_tokens": 0, "max_queued": 256, "max_held_bytes": 1 << 30, **settings}
        service = service_of(process.score, process.generate, limits=limits, **bounds)
        with listening(service, connections=256) as (url, _):
            yield url, lambda request: executor.submit(engine_process._score, request).result()
