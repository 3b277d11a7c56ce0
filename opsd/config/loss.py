"""What the student minimises, and what comes from the teacher for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opsd.config.checks import at_least, one_of
from opsd.errors import ConfigError

PAYLOADS = ("auto", "logprobs", "hidden")
SUPPORTS = ("auto", "teacher", "student", "union")


@dataclass
class LossConfig:
    divergence: str = "reverse_kl"  # a name in opsd.ops.losses.table.LOSSES
    options: dict[str, Any] = field(default_factory=dict)  # e.g. {beta: 0.5} for jsd
    terms: dict[str, Any] = field(default_factory=dict)  # added to it: another such name -> {weight, options}
    # The tokens that have a bucket of their own: teacher | student | union | auto, which is union where the teacher
    # scores the student's candidates, else teacher.
    support: str = "auto"
    # What comes from the teacher to the loss. logprobs: of the support's tokens; all others are one bucket. hidden: its
    # last hidden state of each kept token, from which the learner makes the whole distribution: no support, no bias.
    # auto: hidden where the run's own teacher can give it and the loss take it, and no support is asked for.
    payload: str = "auto"
    # The reverse KL alone: a gradient that is, on average over the answers, that of the whole vocabulary and not that
    # of the named tokens and a rest. Needs rollout.temperature=1, rollout.top_p=1 and the student's own answers.
    residual: bool = False
    # Of a token's weight, which is then how much likelier it is to the learning weights than to those that sampled it,
    # at most this: see schedule.max_staleness. 2 is usual; 0: no such weight.
    importance_cap: float = 0.0

    def __post_init__(self) -> None:
        one_of("loss.support", self.support, SUPPORTS)
        one_of("loss.payload", self.payload, PAYLOADS)
        if self.importance_cap:
            self._check_importance()
        if self.residual and self.payload == "hidden":
            raise ConfigError(
                "loss.residual=true mends what loss.payload=logprobs leaves out, and "
                "loss.payload=hidden leaves nothing out: set one of them"
            )
        for name, settings in self.terms.items():
            weight = settings.get("weight") if isinstance(settings, dict) else None
            if not isinstance(weight, (int, float)) or isinstance(weight, bool):
                raise ConfigError(f"loss.terms.{name} must look like {{weight: 0.1}}, got {settings!r}")

    def _check_importance(self) -> None:
        at_least("loss.importance_cap", self.importance_cap, 1)
        refused = {"divergence=forward_kl": self.divergence == "forward_kl", "residual=true": self.residual}
        refused["payload=hidden"] = self.payload == "hidden"
        for setting in (name for name, is_set in refused.items() if is_set):
            raise ConfigError(
                f"loss.{setting} needs loss.importance_cap=0, got {self.importance_cap:g}: the weight is for losses of "
                "the token that was sampled"
            )
