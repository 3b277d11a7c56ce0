"""What `loss.payload` needs of the other settings, and what auto means: one rule for a run and its plan."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from opsd.config.engine import require_hidden
from opsd.config.run import RunConfig
from opsd.errors import ConfigError

Config = TypeVar("Config", bound=RunConfig)


def with_payload(cfg: Config, *, by_token: bool) -> Config:
    """`cfg` with loss.payload=auto decided: hidden where a teacher of the run's own can give it and the loss take it.

    `by_token`: the loss is a sum over the vocabulary, see `Loss`. What says which log-probabilities the loss is to see
    (loss.support, loss.residual, loss.importance_cap) asks for log-probabilities. A server's hidden states would cross
    the network, all of them, so they are sent only where they are asked for.
    """
    if cfg.loss.payload != "auto":
        return cfg
    sees_logprobs = cfg.loss.support != "auto" or cfg.loss.residual or cfg.loss.importance_cap
    payload = "logprobs" if sees_logprobs or not by_token or cfg.teacher.remote or why_not_hidden(cfg) else "hidden"
    return replace(cfg, loss=replace(cfg.loss, payload=payload))


def check_payload(cfg: RunConfig) -> None:
    """Raises ConfigError where the teacher's hidden states are asked for and cannot be had."""
    reason = why_not_hidden(cfg)
    if cfg.loss.payload == "hidden" and reason:
        raise ConfigError(reason)


def why_not_hidden(cfg: RunConfig) -> str | None:
    """For the user: why the learner cannot have the teacher's hidden states and its lm_head. None: it can."""
    try:
        require_hidden(cfg.teacher)
    except ConfigError as error:
        return str(error)
    if cfg.teacher.by_source:
        return "loss.payload=hidden takes one teacher, got teacher.by_source: set loss.payload=logprobs"
    if cfg.teacher.follow_decay is not None:
        return (
            "loss.payload=hidden reads the teacher's lm_head once, and teacher.follow_decay changes it: set "
            "loss.payload=logprobs"
        )
    if not cfg.teacher.path:
        return (
            "loss.payload=hidden needs teacher.path, where the learner reads the teacher's lm_head (of a server at "
            "teacher.urls too)"
        )
    return None
