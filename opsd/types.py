"""What moves between the stages: frozen records, checked where they are made.

A stop token needs one remark. Student and teacher may end an answer with different ids. Both sets together are ONE
event, named by the smallest of these ids (`Vocabulary.stop_event`); every id below that is called an "event id" has
been mapped so, and every log-probability beside it is that of the whole event.
"""
# T response tokens, P prompt tokens, C student candidates, K teacher top-k, N kept tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsd.errors import common_names, expect_all, expect_places, expect_shape
from opsd.sequences import Mixture, Trajectory, expect_beside, expect_versions


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The token ids on which student and teacher agree."""

    size: int  # ids 0 .. size-1 are shared; a larger (padded) id of either model is masked out
    stop_ids: tuple[int, ...]  # ascending; ids with which student or teacher ends an answer: one event
    foreign_ids: tuple[int, ...] = ()  # ascending; ids below `size` that are masked out all the same

    def __post_init__(self) -> None:
        if not self.stop_ids or list(self.stop_ids) != sorted(set(self.stop_ids)):
            raise ValueError(f"stop_ids must be ascending, distinct and at least one, got {self.stop_ids}")
        if self.stop_ids[0] < 0 or self.stop_ids[-1] >= self.size:
            raise ValueError(f"stop_ids must lie in 0..{self.size - 1}, got {self.stop_ids}")
        foreign, stops = self.foreign_ids, set(self.stop_ids)
        if list(foreign) != sorted(set(foreign)) or any(i in stops or not 0 <= i < self.size for i in foreign):
            raise ValueError(
                f"foreign_ids must be ascending, distinct, below {self.size} and no stop ids, got {foreign}"
            )

    def is_foreign(self, token_ids: np.ndarray) -> np.ndarray:
        """bool, of the same shape: no event of the shared vocabulary. -1, an empty slot, is not foreign."""
        foreign = token_ids >= self.size
        return foreign | np.isin(token_ids, self.foreign_ids) if self.foreign_ids else foreign

    @property
    def stop_event(self) -> int:
        return self.stop_ids[0]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the user's prompt file, tokenised once."""

    index: int  # row of the file, from 0: names the prompt for the whole run
    token_ids: np.ndarray  # int32 [P], as the student sees it
    text: str  # what was tokenised
    answer: str | None  # the reference answer, for grading
    source: str  # the file that it came from
    data_source: str = ""  # the row's field of that name, as verl's files have it; empty: none
    teacher_token_ids: np.ndarray | None = None  # int32, as the teacher sees it; None: as the student
    response_ids: np.ndarray | None = None  # int32 [T], the file's own answer with a stop token; None: it has none
    row: dict[str, Any] | None = None  # all fields, for tools; None: the run has none
    max_response_tokens: int | None = None  # where an answer has less room than others; None: as they have

    @property
    def scored_after(self) -> np.ndarray:
        """int32: what stands before the response when the teacher scores it."""
        return self.token_ids if self.teacher_token_ids is None else self.teacher_token_ids


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One answer that the student sampled. Log-probabilities are natural and at temperature 1."""

    prompt: Prompt
    sample: int  # 0 .. samples_per_prompt-1, and on where the prompt is in the step's batch again
    response_ids: np.ndarray  # int32 [T], as generated, the stop token included; fed to the models as it is
    sampled_logprobs: np.ndarray  # float32 [T], of the sampled event
    candidate_ids: np.ndarray  # int32 [T, C] event ids, the student's likeliest; -1 marks an empty slot
    candidate_logprobs: np.ndarray  # float32 [T, C]; -inf in an empty slot
    stopped: bool  # True: ended with a stop token; False: cut at the length limit
    policy_version: int  # steps after which the weights stood, skipped ones too; -1: the student did not sample it
    token_versions: np.ndarray | None = None  # int32 [T], of each token, from policy_version on; None: all are of it
    mixture: Mixture | None = None  # what both models read at its place; None: the rollout itself
    trajectory: Trajectory | None = None  # what stands between its tokens; None: it is one turn
    candidates: Any = None  # where these two are, see opsd.engines.candidates, while they have no columns; None: here

    def __post_init__(self) -> None:
        num_tokens = len(self.response_ids)
        if num_tokens == 0:
            raise ValueError(f"rollout of prompt {self.prompt.index} is empty")
        expect_shape("sampled_logprobs", self.sampled_logprobs, (num_tokens,))
        expect_shape("candidate_logprobs", self.candidate_logprobs, self.candidate_ids.shape)
        expect_shape("candidate_ids", self.candidate_ids, (num_tokens, self.candidate_ids.shape[-1]))
        expect_beside(len(self.prompt.token_ids), num_tokens, self.mixture, self.trajectory)
        expect_versions(self.token_versions, self.policy_version, num_tokens)

    def __len__(self) -> int:
        return len(self.response_ids)

    @property
    def read_ids(self) -> np.ndarray:
        """int32 [R], R >= T: what models read behind the prompt."""
        return self.response_ids if self.trajectory is None else self.trajectory.read_ids

    @property
    def place_T(self) -> np.ndarray:
        """int64 [T]: where in `read_ids` the rollout's tokens stand."""
        return np.arange(len(self)) if self.trajectory is None else self.trajectory.place_T

    @property
    def version_T(self) -> np.ndarray:
        """int32 [T]: the policy version that drew each token."""
        return np.full(len(self), self.policy_version, np.int32) if self.token_versions is None else self.token_versions


@dataclass(frozen=True, kw_only=True)
class TeacherScores:
    """The teacher's log-probabilities on the response rows of one rollout; row t: the distribution of y_t."""

    top_ids: np.ndarray  # int32 [T, K] event ids, likeliest first; -1 marks an empty slot
    top_logprobs: np.ndarray  # float32 [T, K]; -inf in an empty slot
    sampled_logprobs: np.ndarray  # float32 [T], of the event that the student sampled
    candidate_logprobs: np.ndarray | None  # float32 [T, C] at Rollout.candidate_ids; None: the backend cannot
    hidden: np.ndarray | None = None  # [T, D], last hidden states, float32 or bfloat16 as uint16; None: not asked for
    entropy: np.ndarray | None = None  # float32 [T], nats, of the whole distribution; None: the backend cannot
    attention: np.ndarray | None = None  # float32 [T], that the teacher pays to y_t; None: not asked for

    def __post_init__(self) -> None:
        num_tokens = len(self.sampled_logprobs)
        if self.hidden is not None:
            expect_shape("hidden", self.hidden, (num_tokens, self.hidden.shape[-1]))
        for name, values in (("entropy", self.entropy), ("attention", self.attention)):
            if values is not None:
                expect_shape(name, values, (num_tokens,))
        expect_shape("top_ids", self.top_ids, (num_tokens, self.top_ids.shape[-1]))
        expect_shape("top_logprobs", self.top_logprobs, self.top_ids.shape)

    def has_nan(self) -> bool:
        parts = (self.top_logprobs, self.sampled_logprobs, self.candidate_logprobs)
        return any(part is not None and bool(np.isnan(part).any()) for part in parts)


@dataclass(frozen=True, kw_only=True)
class NoScores:
    """Why the teacher has none for a rollout, in place of TeacherScores."""

    reason: str  # under which metrics count it: foreign_token | teacher_refused | teacher_error
    said: str = ""  # by the teacher, in a line


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """What is known of every response token before selection: of one rollout, or of rollouts one after another.

    A run fills every field, from either source (`stats`); None is for statistics that a user makes by hand.
    """

    entropy_T: Tensor  # float32 [T], H(student) / log V, in [0, 1]
    reverse_kl_T: Tensor  # float32 [T], KL(student || teacher), nats
    forward_kl_T: Tensor  # float32 [T], KL(teacher || student), nats
    compatibility_T: Tensor | None = None  # float32 [T], the teacher's mass on the student's 16 likeliest events
    student_logprob_T: Tensor | None = None  # float32 [T], of the sampled event, nats
    teacher_logprob_T: Tensor | None = None  # float32 [T], of the sampled event, nats
    teacher_entropy_T: Tensor | None = None  # float32 [T], H(teacher) / log V, in [0, 1]
    # float32 [T], the student's mass on the tokens that have a bucket of their own in what compares the two models; the
    # rest of it is one bucket, in which they cannot be told apart.
    named_mass_T: Tensor | None = None
    attention_T: Tensor | None = None  # float32 [T], that the teacher pays to the token; only with teacher.attention
    extra: dict[str, Tensor] = field(default_factory=dict)  # float32 [T] each, asked for by TrainHooks.statistics

    def __post_init__(self) -> None:
        twice = self.extra.keys() & vars(self).keys()
        if twice:
            raise ValueError(f"extra must have names of its own, got {', '.join(sorted(twice))}")
        for name, value_T in self.known().items():
            expect_shape(name, value_T, tuple(self.entropy_T.shape))

    def __len__(self) -> int:
        return len(self.entropy_T)

    def known(self) -> dict[str, Tensor]:
        """Every statistic that is there, by name: fields and extra ones alike."""
        return {name: value for name, value in {**vars(self), **self.extra}.items() if isinstance(value, Tensor)}

    @classmethod
    def concatenate(cls, parts: Sequence[TokenStats]) -> TokenStats:
        """One after another. Raises ValueError where some of the parts have a statistic and others do not."""
        known = [part.known() for part in parts]
        return cls.of({name: torch.cat([part[name] for part in known]) for name in common_names(known)})

    def take(self, index_N: Tensor) -> TokenStats:
        """The tokens at these places, in this order."""
        return self.of({name: value_T[index_N] for name, value_T in self.known().items()})

    def to(self, device: torch.device | str) -> TokenStats:
        return self.of({name: value_T.to(device) for name, value_T in self.known().items()})

    @classmethod
    def of(cls, known: dict[str, Tensor]) -> TokenStats:
        """The statistics made of what `known` gives."""
        own: dict[str, Any] = {each.name: known[each.name] for each in fields(cls) if each.name in known}
        return cls(**own, extra={name: value_T for name, value_T in known.items() if name not in own})


@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout with its scores: one object, so that no list can slip against another."""

    rollout: Rollout
    scores: TeacherScores

    def __post_init__(self) -> None:
        where = f"prompt {self.rollout.prompt.index}: the scores' sampled_logprobs"
        expect_shape(where, self.scores.sampled_logprobs, (len(self.rollout),))


@dataclass(frozen=True, kw_only=True)
class BatchStats:
    """The global batch of a step, as the selection sees it."""

    step: int
    lengths: tuple[int, ...]  # response tokens of each rollout; sums to len(tokens)
    tokens: TokenStats
    progress: float = 0.0  # share of the run's steps that are done, [0, 1)
    num_steps: int = 1  # of the whole run
    prompt_R: Tensor | None = None  # int64 [R], the prompt of each rollout: those of one prompt are a group
    sample_R: Tensor | None = None  # int64 [R], the number of each among the answers to its prompt
    on_policy_R: Tensor | None = None  # bool [R], sampled by the current student
    reward_R: Tensor | None = None  # float32 [R], 1 right, 0 wrong; None: the run has no grader

    def __post_init__(self) -> None:
        if sum(self.lengths) != len(self.tokens):
            raise ValueError(f"lengths sum to {sum(self.lengths)}, statistics cover {len(self.tokens)} tokens")

    @property
    def rollout_T(self) -> Tensor:
        """int64 [T]: which rollout a token is of."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    @property
    def position_T(self) -> Tensor:
        """int64 [T]: a token's place in its response, from 0."""
        return torch.cat([torch.arange(length) for length in self.lengths])


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which tokens of the global batch are trained on, and with what weight relative to each other."""

    index_N: Tensor  # int64 [N], ascending and distinct, into the batch's tokens
    weight_N: Tensor  # float32 [N], >= 0, at least one > 0; the learner divides by `denominator`
    temperature_N: Tensor | None = None  # float32 [N], > 0, divides both models' logits; its square scales the loss
    inputs: dict[str, Tensor] = field(default_factory=dict)  # [N] each: what the objective takes by these names
    # What the weighted sum over the global batch is divided by, > 0; None: the sum of the weights. Infinite: a step of
    # loss 0, for a method that finds nothing to learn.
    denominator: float | None = None

    def __post_init__(self) -> None:
        if self.denominator is not None and not self.denominator > 0:
            raise ValueError(f"denominator must be greater than 0, got {self.denominator}")
        rows = {"weight_N": self.weight_N, **self.inputs}
        if self.temperature_N is not None:
            rows["temperature_N"] = self.temperature_N
        for name, values in rows.items():
            expect_shape(name, values, tuple(self.index_N.shape))
        if self.index_N.dtype != torch.int64:
            raise ValueError(f"index_N must be int64, got {self.index_N.dtype}")
        expect_places("index_N", self.index_N)
        expect_all("weight_N must be finite and at least 0", self.weight_N, self.weight_N >= 0)
        if self.temperature_N is not None:
            expect_all("temperature_N must be finite and above 0", self.temperature_N, self.temperature_N > 0)

    def __len__(self) -> int:
        return len(self.index_N)

    def take(self, place_M: Tensor) -> Selection:
        """The kept tokens at these places, in this order."""
        return Selection(
            index_N=self.index_N[place_M],
            weight_N=self.weight_N[place_M],
            temperature_N=None if self.temperature_N is None else self.temperature_N[place_M],
            inputs={name: values[place_M] for name, values in self.inputs.items()},
            denominator=self.denominator,
        )


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimiser step did, summed over micro-batches and ranks."""

    loss: float  # weighted mean divergence over the kept tokens of the global batch, nats
    grad_norm: float  # before clipping
    learning_rate: float
    num_kept: int  # tokens in the loss
    num_trunk_tokens: int  # tokens that went through the student's trunk
    skipped: str = ""  # what was not finite, where the step changed nothing; empty: it was taken
    agreement: dict[str, float] = field(default_factory=dict)  # `agreement_sums` of the step; none: nobody asked
