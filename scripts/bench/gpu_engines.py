"""Parts of gpu_check.py that need vLLM and GPUs: tensor parallelism, sleep and wake, weights over NCCL.

Written after vLLM 0.32's sources; not run on a GPU.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from gpu_errors import Check
from gpu_training import TINY, TINY_VOCABULARY
from opsd.config.engine import EngineSpec, RolloutConfig
from opsd.engines.sampling import Sampling
from opsd.types import Prompt, Rollout

PROMPT = np.arange(20, 30, dtype=np.int32)
SAMPLING = Sampling(temperature=0.0, top_p=1.0, max_tokens=32, num_candidates=4)
MODEL_TOKENS = len(PROMPT) + SAMPLING.max_tokens + 1
CONFIG = RolloutConfig(dtype="float32", gpu_memory_utilization=0.3, max_num_seqs=8)
CLOSE = 1e-2  # nats, between two kernels in float32 with TF32 off
LEFT_AWAKE = 0.5  # of the memory that an engine took: it may keep this share when it sleeps


def tensor_parallel(*, device: str) -> list[Check]:
    """One engine on two GPUs against one on one: the same greedy answer, the same log-probabilities."""
    with TemporaryDirectory() as folder:
        path = save_tiny(Path(folder), seed=1)
        rollouts = [answer(start_engine(path, device, tensor_parallel_size=size)) for size in (2, 1)]
    return agreement("TP = 2 against TP = 1", *rollouts)


def sleep_and_wake(*, device: str) -> list[Check]:
    """An engine that shares its GPU gives memory back when it sleeps, and answers as before when it wakes."""
    with TemporaryDirectory() as folder:
        before = used_bytes()
        engine = start_engine(save_tiny(Path(folder), seed=1), device, shares_gpu=True)
        first = answer(engine)
        awake = used_bytes()
        engine.sleep()
        asleep = used_bytes()
        second = answer(engine)
    share = (asleep - before) / max(1, awake - before)
    return [
        Check(what="memory kept in sleep, share of that awake", error=share, allowed=LEFT_AWAKE),
        *agreement("after sleep against before", second, first),
    ]


def nccl_transfer(*, device: str) -> list[Check]:
    """Engines that began with other weights take the learner's over NCCL: then they answer as an engine made of these.

    Two GPUs: one for the engine, one for the learner, each in a Ray actor.
    """
    from opsd.cluster.ray import ray_cluster
    from opsd.config.run import LearnerConfig, StudentConfig
    from opsd.learner.group import LearnerGroup
    from opsd.ops.losses.divergences import reverse_kl
    from opsd.rollout import RolloutPool
    from opsd.weight_sync import weight_sync

    config = replace(CONFIG, weight_transfer="nccl", max_response_tokens=SAMPLING.max_tokens, num_candidates=4)
    with TemporaryDirectory() as folder, ray_cluster(dashboard=False):
        trained, other = (save_tiny(Path(folder) / name, seed=i) for i, name in enumerate(("trained", "other")))
        pool = RolloutPool(spec_of(other, device, config), seed=0)
        learner = LearnerGroup(
            StudentConfig(path=trained),
            LearnerConfig(),
            divergence=reverse_kl,
            support="teacher",
            num_steps=1,
            vocabulary=TINY_VOCABULARY,
            device=device,
        )
        for part in (pool, learner):
            part.wait_ready()
        weight_sync(config, learner, pool)(0)
        [found] = pool.greedy([prompt()])
        pool.engines.close()
        expected = answer(start_engine(trained, device))
    return agreement("over NCCL against from disk", found, expected)


def start_engine(path: str, device: str, *, shares_gpu: bool = False, tensor_parallel_size: int = 1):
    from opsd.engines.vllm import VllmEngine, engine_environment

    os.environ.update(engine_environment(CONFIG, device))  # before vLLM is imported
    spec = spec_of(path, device, replace(CONFIG, tensor_parallel_size=tensor_parallel_size))
    return VllmEngine(replace(spec, shares_gpu=shares_gpu))


def spec_of(path: str, device: str, config: RolloutConfig) -> EngineSpec[RolloutConfig]:
    return EngineSpec(
        path=path, config=config, vocabulary=TINY_VOCABULARY, device=device, max_model_tokens=MODEL_TOKENS
    )


def save_tiny(folder: Path, *, seed: int) -> str:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(Qwen3Config(**TINY), dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def prompt() -> Prompt:
    return Prompt(index=0, token_ids=PROMPT, text="", answer=None, source="gpu_check")


def answer(engine) -> Rollout:
    [group] = engine.generate([(prompt(), 0, 0)], SAMPLING, 0)
    return group[0]


def agreement(what: str, found: Rollout, expected: Rollout) -> list[Check]:
    """Tokens up to the first that differs, and the log-probabilities of these."""
    pairs = zip(found.response_ids, expected.response_ids, strict=False)
    same = next((i for i, (own, other) in enumerate(pairs) if own != other), min(len(found), len(expected)))
    gap = np.abs(found.sampled_logprobs[:same] - expected.sampled_logprobs[:same])
    return [
        Check(what=f"{what}: greedy tokens that differ", error=float(len(expected) - same), allowed=0.0),
        Check(what=f"{what}: log-probabilities, nats", error=float(gap.max(initial=0.0)), allowed=CLOSE),
    ]


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free
