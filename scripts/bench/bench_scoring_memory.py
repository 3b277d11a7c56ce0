"""What scoring one long answer adds to a teacher engine's memory, from hidden states and from vLLM's own
prompt log-probabilities.

    python scripts/bench/bench_scoring_memory.py outputs/smollm2-pair train.jsonl --prompt-key question --chat-template

Each way has an engine in an actor of its own. For every length the actor resets the kernel's mark of its peak resident
set (Linux), scores one rollout of random tokens, and answers by how much the peak stands above what it held before.
The first, short rollout warms up and is not shown.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray

from bench_setup import load_setup, parse_args, print_table
from opsd.cluster.ray import ray_cluster, start_actor
from opsd.config.engine import SCORINGS, EngineSpec, RolloutConfig, TeacherConfig
from opsd.engines.vllm import engine_environment
from opsd.engines.worker import EngineWorker
from opsd.plan.memory import GIB
from opsd.teacher.sources import DEFAULT
from opsd.types import Prompt, Rollout, Vocabulary

WARM_UP = 64  # response tokens


class MeasuredWorker(EngineWorker):
    def peak_of_score(self, rollout: Rollout, top_k: int) -> int:
        """Bytes of resident memory above what the process held before."""
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the peak starts anew at what is held now
        held = resident("VmRSS")
        self.engine.score([rollout], top_k)
        return resident("VmHWM") - held


def resident(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main() -> None:
    args = parse_args(
        __doc__,
        ("--lengths", {"type": int, "nargs": "+", "default": [512, 1024, 2048, 4096]}),
        ("--top-k", {"type": int, "default": 64}),
        ("--num-candidates", {"type": int, "default": 32}),
        ("--dtype", {"default": "bfloat16", "choices": ("float32", "bfloat16")}),
    )
    args.max_tokens = max(args.lengths)
    rollout = RolloutConfig(dtype=args.dtype, max_response_tokens=args.max_tokens, num_candidates=args.num_candidates)
    _, setup = load_setup(args, rollout, teacher_top_k=args.top_k)
    spec = setup.teachers[DEFAULT]
    prompt = setup.train_prompts[0]
    rollouts = [
        random_rollout(prompt, length, args.num_candidates, spec.vocabulary) for length in (WARM_UP, *args.lengths)
    ]
    with ray_cluster(dashboard=False):
        rows = []
        for scoring in SCORINGS:
            worker = measured_worker(with_scoring(spec, scoring))
            peaks = [ray.get(worker.peak_of_score.remote(each, args.top_k)) for each in rollouts][1:]
            ray.kill(worker)
            rows.append([scoring, *(f"{peak / GIB:.3f}" for peak in peaks)])
    print(f"V {spec.vocabulary.size}, {args.dtype}, K {args.top_k}, C {args.num_candidates}: GiB above the idle engine")
    print_table("One rollout of that many tokens", ["teacher.scoring", *map(str, args.lengths)], rows)


def with_scoring(spec: EngineSpec[TeacherConfig], scoring: str) -> EngineSpec[TeacherConfig]:
    return replace(spec, config=replace(spec.config, scoring=scoring))


def measured_worker(spec: EngineSpec[TeacherConfig]) -> ray.actor.ActorHandle:
    environment = engine_environment(spec.config, spec.device)
    worker = start_actor(
        MeasuredWorker, spec.config.scoring, num_gpus=int(spec.device == "cuda"), environment=environment
    )
    ray.get(worker.start.remote(spec))
    return worker


def random_rollout(prompt: Prompt, length: int, num_candidates: int, vocabulary: Vocabulary) -> Rollout:
    rng = np.random.default_rng(length)
    ids = np.setdiff1d(np.arange(vocabulary.size, dtype=np.int32), vocabulary.stop_ids)
    return Rollout(
        prompt=prompt,
        sample=0,
        response_ids=rng.choice(ids, length),
        sampled_logprobs=np.zeros(length, np.float32),
        candidate_ids=np.stack([rng.choice(ids, num_candidates, replace=False) for _ in range(length)]),
        candidate_logprobs=np.zeros((length, num_candidates), np.float32),
        stopped=False,
        policy_version=0,
    )


if __name__ == "__main__":
    main()
