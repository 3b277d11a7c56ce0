"""The Ray actor around an engine: the same for rollouts and for the teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from opsd.cluster.ray import require_here
from opsd.config.engine import EngineSpec
from opsd.engines.installed import require_vllm
from opsd.engines.protocols import Engine
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import VllmEngine
from opsd.engines.work import Work
from opsd.types import Rollout, TeacherScores


def transformers_engine(spec: EngineSpec) -> Engine:
    from opsd.engines.transformers import TransformersEngine  # a vLLM engine's process does without it

    return TransformersEngine(spec)


MADE_BY: dict[str, Callable[[EngineSpec], Engine]] = {"vllm": VllmEngine, "transformers": transformers_engine}


class EngineWorker:
    """Owns one engine; its process holds nothing else. What it answers with comes with the seconds it was at work."""

    def __init__(self) -> None:
        self.busy_s = 0.0  # at answers and scores, since it was started

    def start(self, spec: EngineSpec) -> None:
        section, backend = spec.config.section, spec.config.backend
        require_here(f"the {section} engines' model", spec.path)
        require_vllm({section: backend})  # this node may lack what the driver's has
        self.engine: Engine = MADE_BY[backend](spec)

    def generate(
        self, work: Work, sampling: Sampling, policy_version: int, group_size: int | None
    ) -> Iterator[tuple[dict[int, Rollout], float]]:
        began = time.perf_counter()
        for group in self.engine.generate(work, sampling, policy_version, group_size):
            self.busy_s += time.perf_counter() - began
            began = time.perf_counter()
            yield group, self.busy_s

    def score(self, rollouts: list[Rollout], top_k: int) -> tuple[list[TeacherScores], float]:
        began = time.perf_counter()
        scores = self.engine.score(rollouts, top_k)
        self.busy_s += time.perf_counter() - began
        return scores, self.busy_s

    def update_weights(self, weights: dict[str, Tensor], policy_version: int) -> None:
        self.engine.update_weights(weights, policy_version)

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
