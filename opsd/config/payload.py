"""What `loss.payload` needs of the other settings: one rule for a run and its plan."""

from __future__ import annotations

from opsd.config.engine import require_hidden
from opsd.config.run import RunConfig
from opsd.errors import ConfigError


def check_payload(cfg: RunConfig) -> None:
    """Raises ConfigError where the teacher's hidden states are asked for and cannot be had."""
    if cfg.loss.payload != "hidden":
        return
    require_hidden(cfg.teacher)
    if cfg.teacher.by_source:
        raise ConfigError("loss.payload=hidden takes one teacher, got teacher.by_source: set loss.payload=logprobs")
    if cfg.teacher.follow_decay is not None:
        raise ConfigError(
            "loss.payload=hidden reads the teacher's lm_head once, and teacher.follow_decay changes it: set "
            "loss.payload=logprobs"
        )
    if not cfg.teacher.path:
        raise ConfigError(
            "loss.payload=hidden needs teacher.path, where the learner reads the teacher's lm_head (of a server at "
            "teacher.urls too)"
        )
