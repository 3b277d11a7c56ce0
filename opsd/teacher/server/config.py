"""Every setting of `python -m opsd.teacher.server`, with its default."""

from __future__ import annotations

from dataclasses import dataclass, field

from opsd.config.backends import ENGINES
from opsd.config.checks import at_least, check_values, in_range, one_of, positive
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
    max_candidates: int = 1024  # of the student's for each token, whose log-probabilities a request asks for
    max_answer_mib: int = 1024  # that a request asks for: hidden states are large
    # Requests that wait are scored together up to so many tokens: faster where they are small. 0: each by itself, so
    # that the last bits of its scores, and with them a run's losses, do not depend on who else asks.
    max_merged_tokens: int = 0
    max_queued: int = 256  # requests that wait; the next is told to come back
    max_held_mib: int = 2048  # of the requests that arrive, wait or are worked on; the next is told to come back
    # A further one takes the place of the one that has waited longest without asking anything; where all have asked, it
    # is told to come back.
    max_connections: int = 512
    transfer_timeout_s: float = 120.0  # for a whole request to arrive, and for its answer to be taken
    engine_timeout_s: float = 1800.0  # a call of the engine that takes longer hangs: the server ends
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    def __post_init__(self) -> None:
        check_values(self)
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        in_range("port", self.port, 0, 65535)
        at_least("max_merged_tokens", self.max_merged_tokens, 0)
        for name in vars(self):
            if name.startswith("max_") and name != "max_merged_tokens":
                at_least(name, getattr(self, name), 1)
            elif name.endswith("_s"):
                positive(name, getattr(self, name))
        at_least("max_held_mib", self.max_held_mib, self.max_body_mib)
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
