"""Settings of the simulation that a plan adds where it is told how fast the workers are."""

from __future__ import annotations

from dataclasses import dataclass, fields

from opsd.config.checks import at_least, in_range, one_of, positive, share_above_0
from opsd.errors import ConfigError
from opsd.plan.simulate.estimated import GPUS
from opsd.plan.simulate.parts import Rates

DISPATCHES = ("pulled", "dealt")


@dataclass
class SimulateConfig:
    """How long a step takes, which role is idle, the best split of the GPUs: a plan adds it where it has the rates.

    They come from a finished run, from a GPU's data sheet, or from here: a rate that is given goes before the others.
    """

    run: str = ""  # folder of a finished run of the same models: its rates, and the lengths of its answers
    # A rough estimate by the data sheet of a GPU: a100 | h100 | h200 | b200. No rate of it was measured.
    gpu: str = ""
    max_staleness: int = 2  # the loop is simulated with 0 to so many steps by which rollouts may be ahead of it
    # How the rollout engines get a step's requests: pulled, as they get free, which is the loop's way | dealt, an even
    # part for each at once.
    dispatch: str = "pulled"
    num_steps: int = 12  # that are simulated
    median_tokens: int = 0  # of an answer; 0: the run's answers, or a quarter of rollout.max_response_tokens
    # 99 % of the answers are shorter, lengths being log-normal and cut at rollout.max_response_tokens; 0: that limit.
    tail_tokens: int = 0
    prompt_tokens: int = 0  # of every prompt; 0: the run's, or 256 and at most data.max_prompt_tokens
    kept_ratio: float | None = None  # share of the response tokens that is learnt from; null: the run's, or 1
    decode_step_s: float | None = None  # of a rollout engine: a decode step without any sequence
    decode_sequence_s: float | None = None  # and for each sequence that runs in it
    # Of a run that measures the whole decode step only: the share of it that does not grow with the sequences, at the
    # run's own number of them.
    decode_fixed_share: float = 0.5
    # Of a run, likewise: the share of a teacher's batch and of a learner's step that no further worker shortens; null:
    # 0.5 on the CPU, where models are tiny, 0.1 on a GPU.
    overhead_share: float | None = None
    prefill_tokens_per_s: float | None = None  # of a rollout engine
    score_tokens_per_s: float | None = None  # of a teacher's engine, prompts and responses
    score_batch_s: float | None = None  # of each of its batches, on top
    learn_tokens_per_s: float | None = None  # of a learner's rank, prompts and responses, every token kept
    learn_step_s: float | None = None  # of each of its steps, on top
    head_share: float | None = None  # of a rank's time, every token kept, that falls with kept_ratio
    select_s: float | None = None  # on the driver, of a step
    sync_s: float | None = None  # until the engines run on new weights

    def __post_init__(self) -> None:
        if self.gpu:
            one_of("simulate.gpu", self.gpu, tuple(GPUS))
        one_of("simulate.dispatch", self.dispatch, DISPATCHES)
        for name in ("max_staleness", "median_tokens", "tail_tokens", "prompt_tokens"):
            at_least(f"simulate.{name}", getattr(self, name), 0)
        at_least("simulate.num_steps", self.num_steps, 3 * self.max_staleness + 2)
        if self.median_tokens and self.tail_tokens:
            at_least("simulate.tail_tokens", self.tail_tokens, self.median_tokens)
        if self.run and self.gpu:
            raise ConfigError(f"simulate.run={self.run} and simulate.gpu={self.gpu}: take the rates from one of them")
        in_range("simulate.decode_fixed_share", self.decode_fixed_share, 0.0, 1.0)
        in_range("simulate.overhead_share", self.overhead_share or 0.0, 0.0, 0.9)
        if self.kept_ratio is not None:
            share_above_0("simulate.kept_ratio", self.kept_ratio)
        for name, value in self.given_rates.items():
            if name.endswith("_per_s"):
                positive(f"simulate.{name}", value)
            else:
                at_least(f"simulate.{name}", value, 0)

    @property
    def given_rates(self) -> dict[str, float]:
        """Those of `opsd.plan.simulate.parts.Rates` that are set here, by name."""
        names = [field.name for field in fields(Rates)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def wanted(self) -> bool:
        return bool(self.run or self.gpu or self.given_rates)
