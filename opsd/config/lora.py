"""student.lora: a low-rank adapter trains in place of the student's own weights, and what cannot go with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opsd.config.checks import at_least, positive
from opsd.errors import ConfigError

if TYPE_CHECKING:
    from opsd.config.run import RunConfig

ALPHA = 32.0


@dataclass
class LoraConfig:
    rank: int = 0  # of the adapter (LoRA) that trains beside each frozen linear layer; 0: the student itself trains
    # What a layer adds is alpha / rank times the product of its two factors.
    alpha: float = ALPHA
    # Names of the layers that get one, such as [q_proj, v_proj]; empty: every linear layer of the decoder.
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least("student.lora.rank", self.rank, 0)
        positive("student.lora.alpha", self.alpha)
        if not self.rank and (self.alpha != ALPHA or self.targets):
            raise ConfigError(
                "student.lora.rank=0 trains the student itself, and alpha and targets are an adapter's: set "
                "student.lora.rank to 1 or more"
            )

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied by; 0 where there is no adapter."""
        return self.alpha / self.rank if self.rank else 0.0


def check_lora(cfg: RunConfig) -> None:
    """Raises ConfigError where the run needs what an adapter cannot give."""
    if not cfg.student.lora.rank:
        return
    setting = f"student.lora.rank={cfg.student.lora.rank}"
    if cfg.teacher.follow_decay is not None:
        raise ConfigError(
            f"{setting} trains two factors of each weight, and the mean of their products, which teacher.follow_decay "
            "asks for, is not the product of their means: set one of the two"
        )
    if cfg.rollout.weight_transfer in ("nccl", "ipc"):
        raise ConfigError(
            f"{setting} sends merged weights, through the object store alone: set rollout.weight_transfer=auto, got "
            f"{cfg.rollout.weight_transfer}"
        )
