"""What an engine is asked for beside its prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an engine draws its answers. Log-probabilities are reported at temperature 1 whatever stands here."""

    temperature: float  # 0: greedy
    top_p: float  # (0, 1]
    max_tokens: int  # of one response
    num_candidates: int  # C of the rollouts
    top_k: int = 0  # draw from the likeliest so many tokens; 0: from all

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ValueError(f"need a finite temperature >= 0 and 0 < top_p <= 1, got {self}")
        if self.max_tokens < 1 or self.num_candidates < 1:
            raise ValueError(f"need max_tokens and num_candidates >= 1, got {self}")
