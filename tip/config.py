"""The settings that token importance adds to a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from opsd.config import RunConfig, one_of
from opsd.errors import ConfigError


@dataclass
class SelectorConfig:
    """Which tokens are trained on. The two names are looked up when the hooks are built, so a run can bring its own."""

    name: str = "top_ratio"  # a name in tip.selectors.SELECTORS
    score: str = "soft_or"  # a name in tip.scores.SCORES
    ratio: float = 0.5  # share of the tokens that stays (top_ratio, sampled)
    scope: str = "rollout"  # rollout | batch: of which tokens `ratio` is a share
    scaling: str = "minmax"  # minmax | quantile: how entropy and divergence come to [0, 1]
    clip_quantile: float = 0.98  # minmax only: entropy is cut at this quantile first; 1 leaves it whole

    def __post_init__(self) -> None:
        one_of("selector.scope", self.scope, ("rollout", "batch"))
        one_of("selector.scaling", self.scaling, ("minmax", "quantile"))
        for name in ("ratio", "clip_quantile"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"selector.{name} must be in (0, 1], got {getattr(self, name)}")


@dataclass
class TipRunConfig(RunConfig):
    """A run of `python -m tip.train`: distillation on the tokens that the selector keeps."""

    hooks: str = "tip.plugin:build_hooks"
    selector: SelectorConfig = field(default_factory=SelectorConfig)
