"""What running ahead and taking work saves: the pools of a run, around engines and a learner that only sleep.

    python scripts/bench/bench_overlap.py

Everything between the stages is a run's own: actors, queue, streams, the teacher's hand-over, weights on their way.
Only a token costs a fixed sleep in place of a model. So the sleeps alone are the ideal that a table compares with, and
two cores are enough to measure what sixty-four GPUs would wait.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import ray

from bench_setup import print_table
from opsd.ahead import RolloutsAhead
from opsd.batch import scored_batch
from opsd.cluster.ray import ray_cluster
from opsd.config.engine import EngineSpec, RolloutConfig, TeacherConfig
from opsd.data.prompts import PromptSource
from opsd.engines.pool import EnginePool
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.engines.work import Work, as_work, size_of
from opsd.engines.worker import EngineWorker
from opsd.rollout import RolloutPool
from opsd.teacher.pool import TeacherPool
from opsd.types import Prompt, Rollout, TeacherScores, Vocabulary

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))
TAIL = 20.0  # the longest answer, of the median


@dataclass
class SleepRollouts(RolloutConfig):
    step_s: float = 0.0  # of one token of every answer that is under way
    lengths: tuple[int, ...] = ()  # of the answer to each prompt, by its index


@dataclass
class SleepTeacher(TeacherConfig):
    token_s: float = 0.0


class SleepEngine:
    """Decodes a token of all its answers at once, as continuous batching does."""

    vocabulary = VOCABULARY

    def __init__(self, config: SleepRollouts | SleepTeacher) -> None:
        self.config, self.policy_version = config, 0

    def generate(
        self, requests: Sequence[Request] | Work, sampling: Sampling, policy_version: int, group_size: int | None = None
    ) -> Iterator[dict[int, Rollout]]:
        assert policy_version == self.policy_version and isinstance(self.config, SleepRollouts)
        work, left, asked = as_work(requests), {}, {}
        finished: dict[int, Rollout] = {}
        while True:
            if work.more:
                in_flight = sum(size_of(asked[place], sampling.max_tokens) for place in left)
                new = work.take(self.config.max_num_seqs - len(left), in_flight)
                asked |= new
                left |= {place: self.config.lengths[request[0].index] for place, request in new.items()}
            if not left:
                break
            num_tokens = 1 if work.more else min(left.values())  # then until the next one is done
            time.sleep(num_tokens * self.config.step_s)
            left = {place: tokens - num_tokens for place, tokens in left.items()}
            for place in [place for place, tokens in left.items() if tokens == 0]:
                del left[place]
                finished[place] = answer(asked[place][0], self.config.lengths, policy_version)
            if len(finished) >= (group_size or len(asked) + 1):
                yield finished
                finished = {}
        if finished:
            yield finished

    def score(self, rollouts: list[Rollout], top_k: int) -> list[TeacherScores]:
        assert isinstance(self.config, SleepTeacher)
        time.sleep(self.config.token_s * sum(map(len, rollouts)))
        return [scores(rollout) for rollout in rollouts]

    def update_weights(self, named: dict, policy_version: int) -> None:
        self.policy_version = policy_version


class SleepWorker(EngineWorker):
    def start(self, spec: EngineSpec) -> None:
        self.name, self.engine = spec.path, SleepEngine(spec.config)  # type: ignore[assignment]


def answer(prompt: Prompt, lengths: tuple[int, ...], policy_version: int) -> Rollout:
    num_tokens = lengths[prompt.index]
    return Rollout(
        prompt=prompt,
        sample=0,
        response_ids=np.ones(num_tokens, np.int32),
        sampled_logprobs=np.full(num_tokens, -0.5, np.float32),
        candidate_ids=np.ones((num_tokens, 1), np.int32),
        candidate_logprobs=np.full((num_tokens, 1), -0.5, np.float32),
        stopped=False,
        policy_version=policy_version,
    )


def scores(rollout: Rollout) -> TeacherScores:
    own = np.linspace(-2.0, -0.1, len(rollout), dtype=np.float32)  # a teacher whose tokens are all alike is refused
    return TeacherScores(
        top_ids=np.ones((len(rollout), 1), np.int32),
        top_logprobs=own[:, None],
        sampled_logprobs=own,
        candidate_logprobs=own[:, None],
    )


def prompts_of(number: int) -> list[Prompt]:
    ids = np.arange(1, 5, dtype=np.int32)
    return [Prompt(index=i, token_ids=ids, text="", answer=None, source="made up") for i in range(number)]


def spec(config: RolloutConfig | TeacherConfig) -> EngineSpec:
    return EngineSpec(path=".", config=config, vocabulary=VOCABULARY, device="cpu", max_model_tokens=10**6)


def steps_s(max_staleness: int, num_steps: int, unit_s: float) -> float:
    """Seconds per step once the pipeline is full, where rollout : score : learn take 4 : 1 : 2 units."""
    prompts, length = prompts_of(16), 20
    config = SleepRollouts(num_workers=2, lengths=(length,) * 16, step_s=4 * unit_s / length, group_size=4)
    rollout_pool = RolloutPool(spec(config), seed=0, max_staleness=max_staleness)
    teacher_pool = TeacherPool(spec(SleepTeacher(token_s=unit_s / (16 * length))))
    for pool in (rollout_pool, teacher_pool):
        pool.wait_ready()
    ahead = RolloutsAhead(
        PromptSource(prompts, len(prompts), seed=0, shuffle=True),
        rollout_pool.sample,
        teacher_pool.begin,
        samples_per_prompt=1,
        first_step=0,
        last_step=num_steps,
        max_staleness=max_staleness,
    )
    ends = []
    for step in range(num_steps):
        scored_batch(ahead.take(step))
        time.sleep(2 * unit_s)
        rollout_pool.update_weights(ray.put({}), policy_version=step + 1)
        ends.append(time.perf_counter())
    for pool in (rollout_pool, teacher_pool):
        assert isinstance(pool.engines, EnginePool)
        pool.engines.close()
    return statistics.median(np.diff(ends[2:]))


def uneven_s(num_engines: int, room: int, num_prompts: int, step_s: float, *, shared: bool) -> tuple[float, float]:
    """(seconds until the last of the answers, the same where nobody ever waits for another)."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(3.0, 1.0, num_prompts), TAIL * np.exp(3.0)).astype(int) + 1
    config = SleepRollouts(
        num_workers=num_engines,
        lengths=tuple(lengths.tolist()),
        step_s=step_s,
        group_size=8,
        max_num_seqs=room,
    )
    pool = EnginePool("rollout", spec(config))
    pool.wait_ready()
    if not shared:  # everything is dealt at the start, and each engine takes its own in its own time
        pool.max_num_seqs = num_prompts
    requests = [(prompt, 0, 0) for prompt in prompts_of(num_prompts)]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=int(lengths.max()), num_candidates=1)
    for asked in (requests[: num_engines * room + 1], requests):  # a pool's first call starts the queue's process
        began = time.perf_counter()
        made = sum(len(group) for group in pool.generate(asked, sampling, 0, config.group_size))
        seconds = time.perf_counter() - began
        assert made == len(asked)
    pool.close()
    return seconds, lengths.sum() * step_s / (num_engines * room)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unit-s", type=float, default=0.5, help="a quarter of the sampling of a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--token-s", type=float, default=0.01, help="of the uneven answers")
    parser.add_argument("--prompts", type=int, default=1280, help="of the uneven answers")
    args = parser.parse_args()
    EnginePool.worker_class = SleepWorker
    with ray_cluster(dashboard=False):
        rows, ideal_s = [], 4 * args.unit_s
        for max_staleness in (0, 1, 2):
            seconds = steps_s(max_staleness, args.steps, args.unit_s)
            rows.append([str(max_staleness), f"{seconds:.3f}", f"{ideal_s:.3f}", f"{ideal_s / seconds:.2f}"])
        header = ["schedule.max_staleness", "s per step", "sampling alone, s", "of the ideal throughput"]
        print_table("Rollout : score : learn = 4 : 1 : 2", header, rows)
        rows = []
        for name, shared in (("dealt in even parts", False), ("taken from the queue", True)):
            seconds, bound_s = uneven_s(4, 4, args.prompts, args.token_s, shared=shared)
            rows.append([name, f"{seconds:.2f}", f"{bound_s:.2f}", f"{seconds / bound_s:.2f}"])
        header = ["work is", "s", "all work / all slots, s", "of the bound"]
        print_table(f"Uneven answers, the longest {TAIL:g} times the median; 4 engines of 4 slots", header, rows)


if __name__ == "__main__":
    main()
