"""vLLM engines of two processes, on Ray actors with a placement or in a server: they answer as one of one does."""

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from opsd.cluster.placement import Placement
from opsd.cluster.ray import ray_cluster
from opsd.config.engine import EngineConfig, EngineSpec, RolloutConfig, TeacherConfig, teacher_spec
from opsd.config.run import RunConfig
from opsd.engines.groups import in_order
from opsd.engines.pool import EnginePool
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import engine_environment
from opsd.errors import StageError
from opsd.teacher.remote.wire import GenerateRequest, ScoreRequest
from opsd.teacher.server.engine_process import EngineProcess
from opsd.types import Prompt, Vocabulary
from tests.tiny_models import make_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
VOCABULARY = Vocabulary(size=64, stop_ids=(0,))
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=12, num_candidates=8)
PROMPTS = [
    Prompt(index=i, token_ids=np.arange(3 + i, 9 + 2 * i, dtype=np.int32), text="", answer=None, source="")
    for i in range(6)
]
CLOSE = {"atol": 1e-4, "rtol": 0}
ENDS_WITHIN_S = 120.0


def started(role, path, config, placement):
    spec = EngineSpec(path=str(path), config=config, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64)
    return EnginePool(role, spec, placement, keeps_payload=True)


def answers(pool, version):
    requests = [(prompt, 0, 100 + prompt.index) for prompt in PROMPTS]
    rollouts = in_order(pool.generate(requests, GREEDY, policy_version=version))
    [told] = pool.scores(pool.score(rollouts, 8))
    return rollouts, [item.scores for item in told.payload.whole().items]


def reference(path, rollout):
    """log-probability of each token of the answer under the model in this folder, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0], -1)
    start = len(rollout.prompt.token_ids)
    return logprobs[start - 1 : -1].gather(1, ids[start:, None])[:, 0].numpy()


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    direct = [int(child) for task in tasks for child in task.read_text().split()]
    return [*direct, *(below for child in direct for below in children(child))]


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def all_end(pids):
    """Whether these processes are gone, or zombies that only wait for their parent to look, before we give up."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not any(map(is_running, pids))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def equal(one, other):
    for (first, first_scores), (second, second_scores) in zip(
        zip(*one, strict=True), zip(*other, strict=True), strict=True
    ):
        assert first.response_ids.tolist() == second.response_ids.tolist()
        np.testing.assert_array_equal(first.candidate_ids[:, 0], second.candidate_ids[:, 0])
        for name in ("sampled_logprobs", "candidate_logprobs"):
            np.testing.assert_allclose(getattr(first, name), getattr(second, name), **CLOSE)
        for name in ("sampled_logprobs", "top_logprobs"):
            np.testing.assert_allclose(getattr(first_scores, name), getattr(second_scores, name), **CLOSE)


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.long)])
def test_two_processes_answer_as_one_also_with_new_weights_and_end_with_their_actor(tied, tmp_path):
    make = {"tied": tied, "eos_token_id": 0, "scale": 2.0}
    old, new = (make_tiny_qwen3(tmp_path / str(seed), seed=seed, **make) for seed in (1, 2))
    cfg = RunConfig(device="cpu", rollout=RolloutConfig(kv_cache_gib=0.03, max_num_seqs=64, tensor_parallel_size=2))
    with ray_cluster(dashboard=False):
        placement = Placement(cfg, "cpu")
        two = started("rollout", old, cfg.rollout, placement)
        one = started("one", old, EngineConfig(backend="transformers"), None)
        two.wait_ready()
        one.wait_ready()
        for version, path in ((0, old), (1, new)):
            weights = ray.put(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict())
            for pool in (one, two):
                pool.update_weights(weights, policy_version=version)
            of_two = answers(two, version)
            equal(answers(one, version), of_two)
            for rollout, scores in zip(*of_two, strict=True):
                np.testing.assert_allclose(rollout.sampled_logprobs, reference(path, rollout), **CLOSE)
                np.testing.assert_allclose(scores.sampled_logprobs, rollout.sampled_logprobs, **CLOSE)
        moved = [np.abs(reference(old, rollout) - rollout.sampled_logprobs).max() for rollout in of_two[0]]
        assert min(moved) > 0.1, "equal weights would hide a lost update"

        pid = ray.get(two.workers[0].__ray_call__.remote(lambda _: os.getpid()))
        started_by_it = children(pid)
        ranks = [child for child in started_by_it if b"Worker" in command_of(child)]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        with pytest.raises(StageError, match="rollout"):
            answers(two, 1)
        os.kill(pid, signal.SIGKILL)
        assert all_end(started_by_it)


def test_a_servers_engine_of_two_processes_scores_and_leaves_none_behind(tmp_path, monkeypatch):
    for name, value in engine_environment(RolloutConfig(), "cpu").items():
        monkeypatch.setenv(name, value)  # the engine sets them in this process, for its child
    path = make_tiny_qwen3(tmp_path, tied=True, seed=1, eos_token_id=0, scale=2.0)
    cfg = TeacherConfig(path=str(path), kv_cache_gib=0.03, max_num_seqs=64, tensor_parallel_size=2)
    spec = teacher_spec(cfg, vocabulary=VOCABULARY, device="cpu", max_model_tokens=64)
    engine, others = EngineProcess(spec), children(os.getpid())

    async def use():
        await engine.start()
        asked = GenerateRequest(prompts=PROMPTS, seeds=[0] * len(PROMPTS), sampling=GREEDY, vocabulary=VOCABULARY)
        rollouts = await engine.generate(asked)
        request = ScoreRequest(rollouts=rollouts, top_k=8, vocabulary=VOCABULARY, with_candidates=False)
        return rollouts, await engine.score(request), children(os.getpid())

    rollouts, scored, started_by_it = asyncio.run(use())
    started_by_it = [child for child in started_by_it if child not in others]  # those of earlier tests of this process
    assert sum(b"Worker" in command_of(child) for child in started_by_it) == 2
    for rollout, scores in zip(rollouts, scored, strict=True):
        np.testing.assert_allclose(scores.sampled_logprobs, reference(path, rollout), **CLOSE)
    engine.stop()
    trackers = [child for child in children(os.getpid()) if b"resource_tracker" in command_of(child)]
    assert all_end([child for child in started_by_it if child not in trackers])
