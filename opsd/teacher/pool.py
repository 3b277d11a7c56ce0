"""The teacher as a scoring service: log-probabilities on the response rows of rollouts."""

from __future__ import annotations

from opsd.config import TeacherConfig
from opsd.engines.pool import EnginePool
from opsd.types import Prompt, Rollout, Sampling, TeacherScores, Vocabulary


class TeacherPool:
    """Scores rollouts; its weights never change."""

    def __init__(self, cfg: TeacherConfig, *, vocabulary: Vocabulary, device: str, max_model_tokens: int) -> None:
        self.cfg = cfg
        self.engines = EnginePool(
            "teacher",
            cfg.path,
            cfg,
            vocabulary=vocabulary,
            device=device,
            max_model_tokens=max_model_tokens,
            trust_remote_code=cfg.trust_remote_code,
            max_batch_tokens=cfg.max_batch_tokens,
        )

    def wait_ready(self) -> None:
        self.engines.wait_ready()

    def score(self, rollouts: list[Rollout]) -> list[TeacherScores]:
        """One TeacherScores a rollout, in order."""
        return self.engines.score(rollouts, self.cfg.top_k)

    def greedy(self, prompts: list[Prompt], max_tokens: int) -> list[Rollout]:
        """The teacher's own answers, for its accuracy."""
        sampling = Sampling(temperature=0.0, top_p=1.0, max_tokens=max_tokens, num_candidates=1)
        return self.engines.generate([(prompt, 0, 0) for prompt in prompts], sampling, 0)
