"""Rollout pool and teacher pool against bare vLLM in the same kind of process, and the bytes that a token costs.

    python scripts/bench/bench_services.py outputs/smollm2-pair train.jsonl --prompt-key question --chat-template

Each pool has one engine. Beside it stands an actor with the same environment and engine settings whose `llm.generate`
is called directly and timed inside the actor: no arrays are made, nothing is sent. The two take turns, and the median
of the repeats' ratios is shown. A rollout's size on the wire is what Ray's object store holds, over its tokens. The
last table runs both pools at once, as a training step does, with rollouts handed over in groups of several sizes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import numpy as np
import ray

from bench_setup import load_setup, parse_args, print_table
from opsd.batch import StepBatch, scored_batch
from opsd.cluster.ray import ray_cluster, start_actor
from opsd.config.engine import EngineSpec, RolloutConfig
from opsd.config.run import RunConfig
from opsd.engines.groups import in_order, score_in_groups
from opsd.engines.pool import request_seed
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import engine_environment
from opsd.engines.worker import EngineWorker
from opsd.payload.scored import ScoredBatch, rollout_stats
from opsd.preflight import Setup
from opsd.rollout import RolloutPool
from opsd.teacher.pool import TeacherPool
from opsd.teacher.sources import DEFAULT
from opsd.types import Prompt, Rollout, ScoredRollout, TeacherScores, Vocabulary


class BareWorker(EngineWorker):
    """vLLM as its documentation calls it, on the engine that a pool's worker would have."""

    def bare_generate(self, prompts: list[Prompt], seeds: list[int], sampling: Sampling, logprobs: bool) -> tuple:
        """(response tokens, seconds)"""
        from opsd.engines.vllm_params import sampling_params  # imports vLLM

        vocabulary, num_logprobs = self.engine.vocabulary, self.engine._num_logprobs(sampling.num_candidates)
        requests = [(prompt, 0, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        params = [sampling_params(sampling, each, list(vocabulary.stop_ids), num_logprobs) for each in requests]
        if not logprobs:
            for own in params:
                own.logprobs = None
        began = time.perf_counter()
        outputs = self._run([prompt.token_ids for prompt in prompts], params)
        return sum(len(output.outputs[0].token_ids) for output in outputs), time.perf_counter() - began

    def bare_score(self, rollouts: list[Rollout], top_k: int) -> float:
        """Seconds, with flat log-probabilities, in the groups that bound the engine's memory."""

        def run(group: list[Rollout]) -> list:
            self._score_outputs(group, top_k, flat=True)
            return group

        began = time.perf_counter()
        score_in_groups(rollouts, self.engine.max_batch_tokens, run)
        return time.perf_counter() - began

    def score_objects(self, rollouts: list[Rollout], top_k: int) -> list:
        """vLLM's usual answer on the response rows: for each a dict of token id -> Logprob object."""
        outputs = self._score_outputs(rollouts, top_k, flat=False)
        return [o.prompt_logprobs[-len(r) :] for o, r in zip(outputs, rollouts, strict=True)]

    def _score_outputs(self, rollouts: list[Rollout], top_k: int, *, flat: bool) -> list:
        from opsd.engines.vllm_params import scoring_params  # imports vLLM

        params = [scoring_params(prompt_logprobs=top_k) for _ in rollouts]
        for own in params:
            own.flat_logprobs = flat
        return self._run([np.concatenate([r.prompt.token_ids, r.response_ids]) for r in rollouts], params)

    def _run(self, sequences: list[np.ndarray], params: list) -> list:
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in sequences]
        return self.engine.llm.generate(prompts, params, use_tqdm=False)


def main() -> None:
    args = parse_args(
        __doc__,
        ("--num-rollouts", {"type": int, "default": 32}),
        ("--repeats", {"type": int, "default": 5}),
        ("--top-k", {"type": int, "default": 64}),
        ("--num-candidates", {"type": int, "default": 32}),
        ("--dtype", {"default": "bfloat16", "choices": ("float32", "bfloat16")}),
        ("--group-sizes", {"type": int, "nargs": "+", "default": [8, 16, 32]}),
    )
    rollout = RolloutConfig(
        dtype=args.dtype,
        max_response_tokens=args.max_tokens,
        num_candidates=args.num_candidates,
        max_num_seqs=args.num_rollouts,
    )
    cfg, setup = load_setup(args, rollout, teacher_top_k=args.top_k)
    prompts = setup.train_prompts[: args.num_rollouts]
    with ray_cluster(dashboard=False):
        rollout_pool = RolloutPool(setup.student, seed=cfg.seed)
        teacher_pool = TeacherPool(setup.teachers[DEFAULT])
        rollout_pool.wait_ready()
        teacher_pool.wait_ready()
        rows, rollouts = rollout_rows(rollout_pool, cfg, setup, prompts, args.repeats)
        score_rows, wire_rows = teacher_rows(teacher_pool, cfg, setup, rollouts, args.repeats)
        overlap_rows = group_rows(rollout_pool, teacher_pool, prompts, args.group_sizes, args.repeats)
    print(f"{len(rollouts)} rollouts, {sum(map(len, rollouts))} tokens, V {setup.vocabulary.size}, {cfg.rollout.dtype}")
    header = ["stage", "against bare vLLM", "tokens/s", "bare tokens/s", "ratio (median)", "ratios"]
    print_table(f"Throughput, {args.repeats} repeats in turn", header, rows + score_rows)
    print_table("On the wire", ["what", "bytes per token", "against objects"], wire_rows)
    header = ["group size", "until the last rollout, s", "until the last score, s", "against one group (median)"]
    print_table("Rollout and score at once", header, overlap_rows)


def rollout_rows(
    pool: RolloutPool, cfg: RunConfig, setup: Setup, prompts: list[Prompt], repeats: int
) -> tuple[list[list[str]], list[Rollout]]:
    bare = bare_worker(setup.student)
    sampling = Sampling(
        temperature=cfg.rollout.temperature,
        top_p=cfg.rollout.top_p,
        max_tokens=cfg.rollout.max_response_tokens,
        num_candidates=cfg.rollout.num_candidates,
    )
    ours, plain, flat = [], [], []  # tokens per second
    for repeat in range(-1, repeats):  # the first warms up
        pool.seed = cfg.seed + repeat + 1  # other answers each time; a training step would ask for weights of its own
        began = time.perf_counter()
        rollouts = in_order(pool.sample(prompts, samples_per_prompt=1, step=-1))
        seconds = time.perf_counter() - began
        seeds = [request_seed(pool.seed, 0, prompt.index, 0) for prompt in prompts]
        without = ray.get(bare.bare_generate.remote(prompts, seeds, sampling, False))
        with_logprobs = ray.get(bare.bare_generate.remote(prompts, seeds, sampling, True))
        assert with_logprobs[0] == sum(map(len, rollouts)), "the same seeds must give the same answers"
        if repeat >= 0:
            ours.append(sum(map(len, rollouts)) / seconds)
            plain.append(without[0] / without[1])
            flat.append(with_logprobs[0] / with_logprobs[1])
    ray.kill(bare)
    name = f"its top {cfg.rollout.num_candidates}, flat"
    return [ratio_row("rollout", name, ours, flat), ratio_row("rollout", "no log-probabilities", ours, plain)], rollouts


def teacher_rows(
    pool: TeacherPool, cfg: RunConfig, setup: Setup, rollouts: list[Rollout], repeats: int
) -> tuple[list[list[str]], list[list[str]]]:
    """Rows on throughput, and rows on bytes."""
    bare = bare_worker(setup.teachers[DEFAULT])
    num_tokens = sum(len(rollout.prompt.token_ids) + len(rollout) for rollout in rollouts)
    ours, flat = [], []
    for repeat in range(-1, repeats):
        began = time.perf_counter()
        scored = scored_batch(pool.begin([dict(enumerate(rollouts))]))
        seconds = time.perf_counter() - began
        bare_seconds = ray.get(bare.bare_score.remote(rollouts, cfg.teacher.top_k))
        if repeat >= 0:
            ours.append(num_tokens / seconds)
            flat.append(num_tokens / bare_seconds)
    objects = bare.score_objects.remote(rollouts, cfg.teacher.top_k)
    throughput = [ratio_row("score (prompt and response)", f"its top {cfg.teacher.top_k}, flat", ours, flat)]
    rows = wire_rows(scored, stored_bytes(objects), setup.vocabulary)
    ray.kill(bare)
    hidden_pool = TeacherPool(replace(setup.teachers[DEFAULT], returns_hidden=True), role="hidden")
    with_hidden = scored_batch(hidden_pool.begin([dict(enumerate(rollouts))]))
    num_bytes = stored_bytes(ray.put([item.scores for item in items_of(with_hidden)]))
    rows.append(["scores, loss.payload=hidden", f"{num_bytes / sum(map(len, rollouts)):.0f}", ""])
    return throughput, rows


def group_rows(
    rollout_pool: RolloutPool, teacher_pool: TeacherPool, prompts: list[Prompt], group_sizes: list[int], repeats: int
) -> list[list[str]]:
    """The same rollouts in turn with each group size; the last row hands over all of them at the end."""
    times: dict[int, list[tuple[float, float]]] = {size: [] for size in (*group_sizes, len(prompts))}
    for repeat in range(repeats):
        for size, found in times.items():
            rollout_pool.cfg.group_size = size
            rollout_pool.seed = repeat
            began = time.perf_counter()
            pending = teacher_pool.begin(rollout_pool.sample(prompts, samples_per_prompt=1, step=-1))
            rollouts_s = time.perf_counter() - began
            scored_batch(pending)
            found.append((rollouts_s, time.perf_counter() - began))
    rows = []
    for size, found in times.items():
        rollouts_s, all_s = (statistics.median(column) for column in zip(*found, strict=True))
        ratios = [own[1] / other[1] for own, other in zip(found, times[len(prompts)], strict=True)]
        rows.append([str(size), f"{rollouts_s:.3f}", f"{all_s:.3f}", f"{statistics.median(ratios):.2f}"])
    return rows


def wire_rows(scored: StepBatch, object_bytes: int, vocabulary: Vocabulary) -> list[list[str]]:
    """As it is, with float16 for the K columns, and as vLLM's objects; and what float16 does to the divergence."""
    rollouts, scores = zip(*((item.rollout, item.scores) for item in items_of(scored)), strict=True)
    halved = [half(own) for own in scores]
    num_tokens = sum(map(len, rollouts))
    score_bytes, half_bytes = stored_bytes(ray.put(scores)), stored_bytes(ray.put(halved))
    exact, rounded = (
        rollout_stats(
            ScoredBatch(items=tuple(ScoredRollout(rollout=r, scores=s) for r, s in zip(rollouts, own, strict=True))),
            vocabulary,
        )
        for own in (scores, [single(own) for own in halved])
    )
    error_T = (exact.reverse_kl_T - rounded.reverse_kl_T).abs()
    print(
        f"float16 columns: reverse KL off by {error_T.mean():.1e} nats on average, {error_T.max():.1e} at most, of "
        f"{exact.reverse_kl_T.mean():.3f}"
    )
    return [
        ["rollouts", f"{stored_bytes(ray.put(rollouts)) / num_tokens:.0f}", ""],
        ["scores", f"{score_bytes / num_tokens:.0f}", f"{object_bytes / score_bytes:.1f} x smaller"],
        ["scores, K columns float16", f"{half_bytes / num_tokens:.0f}", f"{object_bytes / half_bytes:.1f} x smaller"],
        ["scores as vLLM's objects", f"{object_bytes / num_tokens:.0f}", ""],
    ]


def items_of(scored: StepBatch) -> list[ScoredRollout]:
    return [item for payload in scored.payloads for item in payload.whole().items]


def half(scores: TeacherScores) -> TeacherScores:
    return _with_columns(scores, np.float16)


def single(scores: TeacherScores) -> TeacherScores:
    return _with_columns(scores, np.float32)


def _with_columns(scores: TeacherScores, dtype: type) -> TeacherScores:
    return TeacherScores(**{**vars(scores), "top_logprobs": scores.top_logprobs.astype(dtype)})


def stored_bytes(ref: ray.ObjectRef) -> int:
    ray.wait([ref])
    return ray.experimental.get_object_locations([ref])[ref]["object_size"]


def ratio_row(stage: str, against: str, ours: list[float], bare: list[float]) -> list[str]:
    ratios = [own / other for own, other in zip(ours, bare, strict=True)]
    shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
    speeds = (f"{statistics.median(speed):,.0f}" for speed in (ours, bare))
    return [stage, against, *speeds, f"{statistics.median(ratios):.2f}", shown]


def bare_worker(spec: EngineSpec):
    worker = start_actor(
        BareWorker,
        "bare",
        num_gpus=int(spec.device == "cuda"),
        environment=engine_environment(spec.config, spec.device),
    )
    ray.get(worker.start.remote(spec))
    return worker


if __name__ == "__main__":
    main()
