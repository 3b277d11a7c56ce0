"""The Ray actor around an engine: the same for rollouts and for the teacher."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from opsd.cluster.ray import require_here
from opsd.config.engine import EngineConfig
from opsd.engines.installed import require_vllm
from opsd.engines.vllm import VllmEngine
from opsd.types import Prompt, Rollout, Sampling, TeacherScores, Vocabulary

if TYPE_CHECKING:
    from opsd.engines.transformers import TransformersEngine


class EngineWorker:
    """Owns one engine; its process holds nothing else."""

    def start(
        self,
        *,
        path: str,
        config: EngineConfig,
        vocabulary: Vocabulary,
        device: str,
        max_model_tokens: int,
        trust_remote_code: bool,
        max_batch_tokens: int | None = None,
        shares_gpu: bool = False,
    ) -> None:
        require_here(f"the {config.section} engines' model", path)
        require_vllm({config.section: config.backend})  # this node may lack what the driver's has
        Engine: type[VllmEngine] | type[TransformersEngine] = VllmEngine
        if config.backend != "vllm":
            from opsd.engines import transformers as transformers_engine

            Engine = transformers_engine.TransformersEngine
        self.engine = Engine(
            path,
            vocabulary=vocabulary,
            config=config,
            device=device,
            max_model_tokens=max_model_tokens,
            trust_remote_code=trust_remote_code,
            max_batch_tokens=max_batch_tokens,
            **({"shares_gpu": True} if shares_gpu else {}),  # vLLM's only, see opsd.preflight
        )

    def generate(
        self,
        prompts: list[Prompt],
        samples: list[int],
        seeds: list[int],
        sampling: Sampling,
        policy_version: int,
        group_size: int | None,
    ) -> Iterator[dict[int, Rollout]]:
        yield from self.engine.generate(prompts, samples, seeds, sampling, policy_version, group_size)

    def score(self, rollouts: list[Rollout], top_k: int) -> list[TeacherScores]:
        return self.engine.score(rollouts, top_k)

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

    def process_id(self) -> int:
        return os.getpid()
