"""Every setting of `python -m opsd.teacher.server`, with its default."""

from __future__ import annotations

from dataclasses import dataclass, field

from opsd.config.backends import ENGINES
from opsd.config.checks import at_least, check_values, one_of
from opsd.config.engine import TeacherConfig
from opsd.errors import ConfigError

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass
class ServerConfig:
    """One engine behind one address. For more engines start more servers, and name them all in teacher.urls.

    `teacher` is the section that a run without a server would have; its top_k is the most that a client may ask for.
    """

    host: str = "127.0.0.1"  # any other address needs a token
    port: int = 8100  # 0: a free one; the first line that the server prints names it
    device: str = "auto"  # auto | cpu | cuda
    token_env: str = "OPSD_TEACHER_TOKEN"  # environment variable with the bearer token; unset: none is asked for
    token_file: str = ""  # file with the token, before the variable
    # Prompt and response of one rollout, or the model's context where that is less. An engine step holds the logits of
    # whole rollouts, so its memory grows with this.
    max_model_tokens: int = 16384
    max_body_mib: int = 64  # of a request
    max_rollouts: int = 1024  # of a request
    max_tokens: int = 262144  # prompt and response tokens of a request
    # Requests that wait are scored together up to so many tokens: faster where they are small. 0: each by itself, so
    # that the last bits of its scores, and with them a run's losses, do not depend on who else asks.
    max_merged_tokens: int = 0
    max_queued: int = 256  # requests that wait; the next is told to come back
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        check_values(self)
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        for name in ("port", "max_merged_tokens"):
            at_least(name, getattr(self, name), 0)
        for name in ("max_model_tokens", "max_body_mib", "max_rollouts", "max_tokens", "max_queued"):
            at_least(name, getattr(self, name), 1)
        one_of("teacher.backend", self.teacher.backend, ENGINES)
        for name in ("attention", "follow_decay", "by_source"):
            if getattr(self.teacher, name):
                raise ConfigError(f"teacher.{name} is not for a server: it has one teacher whose weights stay")
        if self.teacher.num_workers > 1:
            raise ConfigError(
                f"teacher.num_workers={self.teacher.num_workers}: a server has one engine; start more servers instead"
            )

    def check_token(self, token: str) -> None:
        if self.host not in LOOPBACK and not token:
            raise ConfigError(
                f"host={self.host} can be reached from other machines, so a token must be asked for: put one into "
                f"${self.token_env} or token_file"
            )
