"""The settings that token importance adds to a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opsd.config.backends import backends_that
from opsd.config.checks import one_of, share_above_0
from opsd.config.run import RunConfig
from opsd.errors import ConfigError
from tip.scores import ScoreOptions


@dataclass
class SelectorConfig:
    """Which tokens are trained on. The names are looked up when the hooks are built, so a run can bring its own."""

    name: str = "top_ratio"  # a name in tip.selectors.SELECTORS
    score: str = "soft_or"  # a name in tip.scores.SCORES
    score_options: dict[str, Any] = field(default_factory=dict)  # of that function, e.g. {beta: 1.2} for dial
    ratio: float = 0.5  # share of the tokens that stays (top_ratio, sampled)
    schedule: str = "constant"  # a name in tip.plugin.SCHEDULES: constant | loss_driven
    schedule_options: dict[str, Any] = field(default_factory=dict)  # e.g. {floor: 0.2} for loss_driven
    scope: str = "rollout"  # rollout | batch: of which tokens `ratio` is a share
    scaling: str = ScoreOptions.scaling  # minmax | quantile: how entropy and divergence come to [0, 1]
    # minmax only: entropy is cut at this quantile first; 1 leaves it whole
    clip_quantile: float = ScoreOptions.clip_quantile

    def __post_init__(self) -> None:
        one_of("selector.scope", self.scope, ("rollout", "batch"))
        one_of("selector.scaling", self.scaling, ("minmax", "quantile"))
        for name in ("ratio", "clip_quantile"):
            share_above_0(f"selector.{name}", getattr(self, name))


@dataclass
class TipRunConfig(RunConfig):
    """A run of `python -m tip.train`: distillation on the tokens that the selector keeps."""

    hooks: str = "tip.plugin:build_hooks"
    selector: SelectorConfig = field(default_factory=SelectorConfig)
    filters: dict[str, Any] = field(default_factory=dict)  # before it: name in tip.filters.FILTERS -> options
    adjust: dict[str, Any] = field(default_factory=dict)  # after it: name in tip.adjustments.ADJUSTMENTS -> options
    answers: str = "student"  # a name in tip.answers.ANSWERS: whose answers are trained on
    answer_options: dict[str, Any] = field(default_factory=dict)  # of that function, e.g. {student_share: 0.5}

    def __post_init__(self) -> None:
        super().__post_init__()
        for section in ("filters", "adjust"):
            for name, options in getattr(self, section).items():
                if not isinstance(options, dict):
                    raise ConfigError(f"{section}.{name} must hold options, {{}} for none, got {options!r}")
        if self.selector.score == "attention" and not self.teacher.attention:
            able = backends_that(lambda can: can.returns_attention)
            raise ConfigError(f"selector.score=attention needs teacher.attention=true and teacher.backend={able}")
        if self.answers != "student" and self.tools.build:
            raise ConfigError(f"tools.build needs answers=student, got {self.answers}: no other answers use tools")
        if self.answers == "mixtures" and not self.teacher.can.reads_embeddings:
            able = backends_that(lambda can: can.reads_embeddings)
            raise ConfigError(
                f"answers=mixtures needs teacher.backend={able}: other teachers read token ids, not embeddings"
            )
        of_draws = {"loss.residual=true": self.loss.residual, "loss.importance_cap": self.loss.importance_cap}
        for setting in (name for name, is_set in of_draws.items() if is_set):
            if self.answers != "student":
                raise ConfigError(
                    f"{setting} needs answers=student, got {self.answers}: its gradient is right on average over what "
                    "the student itself draws"
                )
            if "temperature" in self.adjust:
                raise ConfigError(
                    f"{setting} needs tokens at temperature 1, at which the answers are drawn: leave "
                    "adjust.temperature out"
                )
        if self.answers != "student" and self.stats != "learner":
            raise ConfigError(
                f"answers={self.answers} needs stats=learner: for answers that the student did not sample, no engine "
                "has its log-probabilities"
            )
