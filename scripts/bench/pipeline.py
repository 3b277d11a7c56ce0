"""What a step costs the driver: the pools, the batch and the ranks' packing of a run, around payloads that are made up.

    python scripts/bench/pipeline.py                            # 1M response tokens a step, K 64, C 32, half kept
    python scripts/bench/pipeline.py --hidden 1024              # loss.payload=hidden

Engines copy a rollout and its scores from a template, ranks pack what they are given and learn nothing; what lies
between is a run's own. Driver seconds are those of its processor in all of its threads, Ray's too. Memory is the peak
of its resident set within a step, above what it was before the first one; shared memory of the object store that it has
looked at counts. Bytes are those of the objects that were made in the store (smaller ones than 100 kB travel without).
"""
# T response tokens of a rollout, K teacher top-k, C candidates, V vocabulary

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray._private.internal_api import node_stats

from bench_setup import print_table
from opsd.batch import batch_stats, scored_batch
from opsd.cluster.ray import ray_cluster, start_actor
from opsd.config.engine import EngineSpec, RolloutConfig, TeacherConfig
from opsd.engines.pool import EnginePool
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.engines.work import Work, as_work
from opsd.engines.worker import EngineWorker
from opsd.learner.dealing import RankWork
from opsd.learner.group import LearnerGroup
from opsd.learner.packing import micro_batches
from opsd.payload.kept import KeptRows
from opsd.rollout import RolloutPool
from opsd.teacher.pool import TeacherPool
from opsd.types import Prompt, Rollout, Selection, StepReport, TeacherScores, Vocabulary

VOCABULARY = Vocabulary(size=150_000, stop_ids=(0,))
PROMPT_TOKENS = 200
MEGA = 1_000_000


@dataclass
class MadeUpRollouts(RolloutConfig):
    length: int = 1  # tokens of each response


@dataclass
class MadeUpTeacher(TeacherConfig):
    length: int = 1
    num_candidates: int = 1
    width: int = 0  # of the hidden states, bfloat16; 0: none


class MadeUpEngine:
    """Rollouts and scores that agree with each other: both models name the same events, the likeliest was sampled."""

    vocabulary = VOCABULARY

    def __init__(self, config: Any, num_columns: int) -> None:
        rng = np.random.default_rng(0)
        self.config = config
        self.ids = (rng.integers(1, 1000, config.length)[:, None] + 1000 * np.arange(num_columns)).astype(np.int32)
        self.logprobs = -np.sort(rng.exponential(2.0, (config.length, num_columns)), axis=1).astype(np.float32) - 4.0

    def generate(
        self, requests: Sequence[Request] | Work, sampling: Sampling, policy_version: int, group_size: int | None = None
    ) -> Iterator[dict[int, Rollout]]:
        work = as_work(requests)
        while work.more:
            yield {place: self._rollout(asked[0], asked[1]) for place, asked in work.take(group_size or 1, 0).items()}

    def _rollout(self, prompt: Prompt, sample: int) -> Rollout:
        return Rollout(
            prompt=prompt,
            sample=sample,
            response_ids=self.ids[:, 0].copy(),
            sampled_logprobs=self.logprobs[:, 0].copy(),
            candidate_ids=self.ids.copy(),
            candidate_logprobs=self.logprobs.copy(),
            stopped=True,
            policy_version=0,
        )

    def score(self, rollouts: list[Rollout], top_k: int) -> list[TeacherScores]:
        return [self._scores(rollout) for rollout in rollouts]

    def _scores(self, rollout: Rollout) -> TeacherScores:
        width, length = self.config.width, len(rollout)
        return TeacherScores(
            top_ids=self.ids.copy(),
            top_logprobs=self.logprobs.copy(),
            sampled_logprobs=self.logprobs[:, 0].copy(),
            candidate_logprobs=self.logprobs[:, : self.config.num_candidates].copy(),
            entropy=np.full(length, 1.5, np.float32),
            hidden=np.full((length, width), rollout.prompt.index, np.uint16) if width else None,
        )


class MadeUpWorker(EngineWorker):
    def start(self, spec: EngineSpec) -> None:
        config, self.name = spec.config, "made up"
        num_columns = config.num_candidates if isinstance(config, MadeUpRollouts) else config.top_k
        self.engine = MadeUpEngine(config, num_columns)  # type: ignore[assignment]


class PackingRank:
    """A learner's rank that stops where the model would begin."""

    def train_on(self, work: RankWork, *rows: KeptRows) -> StepReport:
        batches = micro_batches(work, rows)
        kept, trunk = (sum(len(getattr(b, name)) for b in batches) for name in ("row_N", "token_ids_L"))
        loss = float(sum(batch.weight_N.sum() for batch in batches))
        return StepReport(loss=loss, grad_norm=0.0, learning_rate=0.0, num_kept=kept, num_trunk_tokens=trunk)


def ranks(num_ranks: int, *, with_hidden: bool) -> LearnerGroup:
    """A LearnerGroup of these ranks."""
    learner = LearnerGroup.__new__(LearnerGroup)
    learner.workers = [start_actor(PackingRank, f"learner-{r}", num_gpus=0, environment={}) for r in range(num_ranks)]
    learner.support, learner.takes_hidden, learner.loss_inputs = "teacher", with_hidden, frozenset()
    learner.micro_batch_tokens = 16_384
    return learner


def every_second(num_tokens: int) -> Selection:
    index_N = torch.arange(0, num_tokens, 2)
    return Selection(index_N=index_N, weight_N=torch.ones(len(index_N)))


def memory(field: str) -> int:
    """Bytes: VmRSS, RssShmem, or VmHWM, the largest VmRSS since `forget_peak`."""
    [kilobytes] = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def store_bytes() -> int:
    """Of all objects that were ever made in this node's store."""
    [node] = ray.nodes()
    return node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats.cumulative_created_bytes


def take_step(step: int, rollout_pool: RolloutPool, teacher_pool: TeacherPool, learner: LearnerGroup, prompts: list):
    """The stages of opsd.train's loop, of which `select` keeps every second token."""
    scored = scored_batch(teacher_pool.begin(rollout_pool.sample(prompts, samples_per_prompt=1, step=-1)))
    batch = batch_stats(step, scored, scored.tokens, None, num_steps=100)
    selection = every_second(len(batch.tokens))
    report = learner.train_step(scored, selection)
    assert 0 < report.num_kept < len(selection)  # of the first rank


def measured(args: argparse.Namespace) -> list[list[str]]:
    """A row per step."""
    spec = {"path": ".", "vocabulary": VOCABULARY, "device": "cpu", "max_model_tokens": 10**6}
    own = {"num_workers": args.engines, "length": args.length}
    rollouts = MadeUpRollouts(
        **own, num_candidates=args.candidates, max_num_seqs=10**6, max_response_tokens=args.length
    )
    teacher = MadeUpTeacher(**own, path=".", top_k=args.top_k, num_candidates=args.candidates, width=args.hidden)
    rollout_pool = RolloutPool(EngineSpec(config=rollouts, **spec), seed=0)
    teacher_pool = TeacherPool(EngineSpec(config=teacher, **spec))
    learner = ranks(args.ranks, with_hidden=args.hidden > 0)
    for pool in (rollout_pool, teacher_pool):
        pool.wait_ready()
    ids = np.arange(1, PROMPT_TOKENS + 1, dtype=np.int32)
    prompts = [
        Prompt(index=index, token_ids=ids, text="", answer=None, source="made up")
        for index in range(args.tokens // args.length)
    ]
    parts = rollout_pool, teacher_pool, learner
    take_step(0, *parts, prompts[:4])  # what is loaded once
    idle, rows = memory("VmRSS"), []
    for step in range(args.steps):
        forget_peak()
        began, began_s, made = time.perf_counter(), time.process_time(), store_bytes()
        take_step(step, *parts, prompts)
        num_tokens, driver_s = len(prompts) * args.length, time.process_time() - began_s
        figures = [
            driver_s * MEGA / num_tokens,
            (memory("VmHWM") - idle) / num_tokens,
            (memory("VmRSS") - idle) / num_tokens,
            memory("RssShmem") / num_tokens,
            (store_bytes() - made) / num_tokens,
            time.perf_counter() - began,
        ]
        rows.append([f"{step + 1}", *(f"{value:.{2 if value < 10 else 0}f}" for value in figures)])
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=MEGA, help="response tokens of a step")
    parser.add_argument("--length", type=int, default=2000, help="tokens of a response")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=0, help="width of hidden states; 0: loss.payload=logprobs")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--engines", type=int, default=2, help="of the student, and of the teacher")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    EnginePool.worker_class = MadeUpWorker
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ray_cluster(dashboard=False):
        rows = measured(args)
    rows.append(["median", *(f"{statistics.median(float(row[i]) for row in rows):g}" for i in range(1, len(rows[0])))])
    header = ["step", "driver s per 1M tokens", "peak, B per token", "after it, B per token", "of it shared",
              "made in the store, B per token", "s per step"]  # fmt: skip
    print_table(f"{args.tokens:,} tokens a step, K {args.top_k}, C {args.candidates}, E {args.hidden}", header, rows)


if __name__ == "__main__":
    main()
