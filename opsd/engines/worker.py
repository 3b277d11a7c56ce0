"""The Ray actor around an engine: the same for rollouts and for the teacher, whose payload it keeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from opsd.cluster.ray import require_here
from opsd.config.engine import EngineSpec
from opsd.engines.candidates import Candidates, Written, put_back, taken_out
from opsd.engines.installed import require_vllm
from opsd.engines.protocols import Engine
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import VllmEngine
from opsd.engines.work import Work
from opsd.ops.signals import Statistics
from opsd.payload.keeper import Keeper
from opsd.payload.whole import own_scores, wholes
from opsd.types import Rollout


def transformers_engine(spec: EngineSpec) -> Engine:
    from opsd.engines.transformers import TransformersEngine  # a vLLM engine's process does without it

    return TransformersEngine(spec)


MADE_BY: dict[str, Callable[[EngineSpec], Engine]] = {"vllm": VllmEngine, "transformers": transformers_engine}


# Concurrency groups of one thread each, whose calls do not wait for what the engine is at.
PAYLOAD_CALLS = "payload"
WEIGHT_CALLS = "weights"


class EngineWorker(Keeper):
    """Owns one engine; its process holds nothing else. What it answers with comes with the seconds it was at work.

    A Keeper's calls and `leave_weights` are made in other threads (see PAYLOAD_CALLS), so that they do not wait for
    what the engine has still to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.busy_s = 0.0  # at answers and scores, since it was started

    def start(self, spec: EngineSpec) -> None:
        section, backend = spec.config.section, spec.config.backend
        require_here(f"the {section} engines' model", spec.path)
        require_vllm({section: backend})  # this node may lack what the driver's has
        self.name = spec.path  # of its model, for messages
        self.engine: Engine = MADE_BY[backend](spec)

    def generate(
        self, work: Work, sampling: Sampling, policy_version: int, group_size: int | None, apart: bool
    ) -> Iterator[tuple[dict[int, Rollout] | dict[int, Written], float] | list[Candidates]]:
        """Groups of rollouts. `apart`: without their candidates, which follow each group as an object of their own."""
        began, waited_s = time.perf_counter(), work.waited_s
        for group in work.made_by(self.engine, sampling, policy_version, group_size):
            self.busy_s += time.perf_counter() - began - (work.waited_s - waited_s)
            began, waited_s = time.perf_counter(), work.waited_s
            if apart:
                written, candidates = taken_out(group)
                yield written, self.busy_s
                yield candidates
            else:
                yield group, self.busy_s

    def score(
        self,
        key: int,
        rollouts: list[Rollout],
        top_k: int,
        statistics: Statistics | None,
        *candidates: list[Candidates],
    ) -> float:
        """The TeacherScores stay here, and are looked through while the engine goes on. `candidates`: those that the
        rollouts name by number."""
        began = time.perf_counter()
        rollouts = put_back(rollouts, candidates)
        scores = own_scores(rollouts, self.engine.score(wholes(rollouts), top_k))
        self.keep(key, self.name, rollouts, scores, self.engine.vocabulary, statistics)
        self.busy_s += time.perf_counter() - began
        return self.busy_s

    def update_weights(self, weights: dict[str, Tensor], policy_version: int) -> None:
        self.engine.update_weights(weights, policy_version)

    def leave_weights(self, weights: dict[str, Tensor], policy_version: int) -> None:
        """For the engine, which takes them in between two steps of what it is at, or before what it is asked next."""
        self.engine.incoming.leave(weights, policy_version)

    def weight_transfer(self, call: str, *request: dict) -> None:
        """One of the calls with which vLLM's sender drives an engine, see opsd.learner.nccl_sender."""
        getattr(self._vllm.llm, call)(*request)

    def expect_weights(self) -> None:
        self._vllm.expect_weights()

    def received_weights(self, policy_version: int) -> None:
        self._vllm.received_weights(policy_version)

    def sleep(self) -> None:
        self._vllm.sleep()

    @property
    def _vllm(self) -> VllmEngine:
        """The engine, where something is asked of it that only vLLM's can do: opsd.preflight refuses the other."""
        assert isinstance(self.engine, VllmEngine), f"expected a vLLM engine, got {type(self.engine).__name__}"
        return self.engine
