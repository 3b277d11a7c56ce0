"""What is simulated: a step's work, the rates of the workers, and who does the work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# R answers of a step


@dataclass(frozen=True, kw_only=True)
class Work:
    """The answers of all steps."""

    lengths: np.ndarray  # int64 [steps, R], response tokens, at least 1
    prompt_tokens: int  # of every prompt
    kept_ratio: float = 1.0  # share of the response tokens that the learner's head sees

    @property
    def num_steps(self) -> int:
        return self.lengths.shape[0]

    @property
    def num_answers(self) -> int:
        """Of a step."""
        return self.lengths.shape[1]

    @property
    def response_tokens(self) -> float:
        """Of a step, on average."""
        return float(self.lengths.sum()) / self.num_steps

    @property
    def sequence_tokens(self) -> float:
        """Of a step with its prompts, on average: what the teacher scores and the learner runs."""
        return self.response_tokens + self.num_answers * self.prompt_tokens


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast one worker of each role is: an engine with all of its GPUs, a rank of the learner."""

    decode_step_s: float  # a decode step without a sequence
    decode_sequence_s: float  # and for each sequence that runs in it
    prefill_tokens_per_s: float  # of the rollout engine
    score_tokens_per_s: float  # of the teacher's engine, prompts and responses
    learn_tokens_per_s: float  # of a rank, prompts and responses, every token kept
    score_batch_s: float = 0.0  # of each batch, on top
    learn_step_s: float = 0.0  # of each step, on top, however many ranks share it
    head_share: float = 0.0  # of a rank's time, every token kept, that falls with kept_ratio
    select_s: float = 0.0  # of a step, on the driver
    sync_s: float = 0.0  # until the engines run on new weights

    def learn_s(self, sequence_tokens: float, kept_ratio: float, num_ranks: int) -> float:
        """Seconds of one optimiser step; the ranks share the tokens evenly."""
        share = 1 - self.head_share * (1 - kept_ratio)
        return self.learn_step_s + sequence_tokens * share / (self.learn_tokens_per_s * num_ranks)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Workers of each role."""

    rollout: int
    teacher: int
    learner: int

    def __str__(self) -> str:
        return f"rollout {self.rollout}, teacher {self.teacher}, learner {self.learner}"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who does the work, and in which order."""

    split: Split
    max_staleness: int = 0  # steps by which the rollouts may be ahead of the learner; 0: the synchronous loop
    # Of a step's requests to the rollout engines. pulled: they take them as they get free | dealt: an even part each.
    dispatch: str = "pulled"
    max_num_seqs: int = 256  # sequences in flight in one rollout engine
    group_size: int = 1  # finished answers that an engine hands to the teacher at once, at least
    max_batch_tokens: int = 8192  # of a teacher's batch
    num_devices: float = math.inf  # that all workers share: cores of a CPU, GPUs of colocated roles


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated run is like once it has got going."""

    seconds_per_step: float
    tokens_per_s: float  # response tokens
    idle: dict[str, float]  # by role, the share of its workers' time in which they have nothing to do
    phase_s: dict[str, float]  # of the phases that a run's metrics have; empty where they overlap
