"""The settings of the engines: the student's for rollouts, the teacher's for scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from opsd.config.backends import CAPABILITIES, DEVICES, ENGINES, REMOTE_BACKENDS, Capabilities, backends_that
from opsd.config.checks import at_least, in_range, one_of, positive, share_above_0
from opsd.config.http import HttpConfig, check_url
from opsd.errors import ConfigError
from opsd.types import Vocabulary

DTYPES = ("auto", "float32", "bfloat16")
TRANSFERS = ("auto", "object_store", "nccl", "ipc")
SCORINGS = ("rows", "prompt_logprobs")
GPU_SHARE = 0.9  # of a GPU that an engine has to itself
COLOCATED_GPU_SHARE = 0.35  # of a GPU that student's engine, teacher's engine and learner share


@dataclass
class EngineConfig:
    """What the rollout engines and the teacher's engines have in common."""

    backend: str = "vllm"  # vllm | transformers
    num_workers: int = 1  # Ray actors, each a whole engine
    # float32 | bfloat16 | auto, the programs' own default: bfloat16 on a GPU, float32 on the CPU
    dtype: str = "float32"
    tensor_parallel_size: int = 1  # vllm only: GPUs (on the CPU, processes) that share every layer of one engine
    # GPU only: the share of a GPU that vLLM fills. None: 0.9, or 0.35 where placement.mode=colocated
    gpu_memory_utilization: float | None = None
    kv_cache_gib: float = 0.25  # CPU only; of a whole engine
    max_num_seqs: int = 256  # sequences in flight in one engine
    cpu_threads: int = 1  # CPU only; more than one slows a tiny model down
    # vllm and GPU only: equal tokens and log-probabilities in any batch (VLLM_BATCH_INVARIANT), at some cost of speed.
    # On the CPU in float32 they are equal anyway, to rounding.
    batch_invariant: bool = False
    # vllm only: further arguments of its LLM by their own names, such as {quantization: fp8, kv_cache_dtype: fp8}; what
    # a setting of this section decides is refused here.
    engine_args: dict[str, Any] = field(default_factory=dict)

    section: ClassVar[str] = "engine"
    backends: ClassVar[tuple[str, ...]] = ENGINES

    def __post_init__(self) -> None:
        one_of(f"{self.section}.backend", self.backend, self.backends)
        one_of(f"{self.section}.dtype", self.dtype, DTYPES)
        if self.gpu_memory_utilization is not None:
            share_above_0(f"{self.section}.gpu_memory_utilization", self.gpu_memory_utilization)
        positive(f"{self.section}.kv_cache_gib", self.kv_cache_gib)
        for name in ("num_workers", "tensor_parallel_size", "max_num_seqs", "cpu_threads"):
            at_least(f"{self.section}.{name}", getattr(self, name), 1)
        if self.tensor_parallel_size > 1 and not (self.can.splits_layers or self.can.remote):
            raise ConfigError(
                f"{self.section}.tensor_parallel_size={self.tensor_parallel_size} needs {self.section}.backend="
                f"{backends_that(lambda can: can.splits_layers)}: a {self.backend} engine is one process"
            )
        if self.engine_args and not self.can.is_vllm:
            raise ConfigError(f"{self.section}.engine_args are vLLM's; {self.section}.backend is {self.backend}")

    @property
    def can(self) -> Capabilities:
        return CAPABILITIES[self.backend]

    @property
    def scoring_bound(self) -> int | None:
        """Prompt and response tokens that an engine scores at once, at most; None: it only generates, no bound."""
        return None

    def gpu_share(self, *, colocated: bool) -> float:
        """The share of a GPU that vLLM fills."""
        if self.gpu_memory_utilization is not None:
            return self.gpu_memory_utilization
        return COLOCATED_GPU_SHARE if colocated else GPU_SHARE


@dataclass
class RolloutConfig(EngineConfig):
    max_response_tokens: int = 512  # a longer answer is cut there
    temperature: float = 1.0  # at which the student samples its answers
    top_p: float = 1.0  # they are drawn from the likeliest tokens that have this probability together
    num_candidates: int = 32  # C: the student's own likeliest tokens that travel with each token
    # How new weights reach the engines: object_store | nccl (vLLM with GPUs of its own) | ipc (vLLM on the learner's,
    # placement.mode=colocated) | auto: nccl or ipc where they are possible, else object_store.
    weight_transfer: str = "auto"
    group_size: int = 32  # the teacher gets finished rollouts of an engine in groups of this size, at once

    section = "rollout"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("rollout.weight_transfer", self.weight_transfer, TRANSFERS)
        positive("rollout.temperature", self.temperature)
        share_above_0("rollout.top_p", self.top_p)
        at_least("rollout.max_response_tokens", self.max_response_tokens, 1)
        at_least("rollout.num_candidates", self.num_candidates, 1)
        at_least("rollout.group_size", self.group_size, 1)


@dataclass
class TeacherConfig(EngineConfig):
    """`backend` is also http (urls of `python -m opsd.teacher.server`) or openai (urls of `vllm serve`)."""

    path: str = ""  # a Hugging Face folder; openai needs its config and tokenizer only, http nothing
    urls: list[str] = field(default_factory=list)  # of servers that serve the same teacher; http and openai only
    http: HttpConfig = field(default_factory=HttpConfig)
    by_source: dict[str, Any] = field(default_factory=dict)  # teachers by data_source, see opsd.teacher.sources
    top_k: int = 64  # K: log-probabilities returned for each token
    # Also score the student's candidates, see loss.support. None: where the teacher can, which is all but openai and
    # scoring=prompt_logprobs; false: never.
    score_candidates: bool | None = None
    # vllm only. rows: the hidden states of the response go through the head, a few rows at a time; exact, and nothing
    # of size tokens x vocabulary. prompt_logprobs: vLLM's own way, which names the top-k and nothing else.
    scoring: str = "rows"
    # Ids, or tokens by their text, that mean something else to the student, or nothing: no probability goes to them,
    # an answer that holds one is dropped and counted (foreign_token), a prompt that holds one is refused.
    ignore_tokens: list[Any] = field(default_factory=list)
    trust_remote_code: bool = False  # run Python code that lies in the model's folder
    attention: bool = False  # also return the attention paid to each token; transformers only, slow, much memory
    follow_decay: float | None = None  # d: the teacher is a running mean of the student, d old + (1 - d) new per step
    max_batch_tokens: int = 8192  # prompt and response tokens scored in one engine step; bounds its memory

    section = "teacher"
    backends = (*ENGINES, *REMOTE_BACKENDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("teacher.top_k", self.top_k, 1)
        one_of("teacher.scoring", self.scoring, SCORINGS)
        if self.scoring != "rows" and not self.can.is_vllm:
            raise ConfigError(f"teacher.scoring={self.scoring} is vLLM's; teacher.backend is {self.backend}")
        at_least("teacher.max_batch_tokens", self.max_batch_tokens, 1)
        for token in self.ignore_tokens:
            if not isinstance(token, (int, str)) or isinstance(token, bool):
                raise ConfigError(f"teacher.ignore_tokens must hold ids or tokens, got {token!r}")
        for url in self.urls:
            check_url("teacher.urls", url)
        if bool(self.urls) != self.remote:
            raise ConfigError(
                f"teacher.urls and teacher.backend={' or '.join(REMOTE_BACKENDS)} need each other, "
                f"got teacher.backend={self.backend} with {len(self.urls)} urls"
            )
        if self.attention and not self.can.returns_attention:
            raise ConfigError(
                f"teacher.attention=true needs teacher.backend={backends_that(lambda can: can.returns_attention)}: a "
                "vLLM engine never forms attention weights, and a server sends none"
            )
        if self.follow_decay is not None:
            in_range("teacher.follow_decay", self.follow_decay, 0.0, 1.0)
            if self.by_source or not self.can.takes_weights:
                raise ConfigError(
                    "teacher.follow_decay needs one teacher in this run (backend "
                    f"{backends_that(lambda can: can.takes_weights)}, no by_source): a server keeps its weights"
                )

    @property
    def scoring_bound(self) -> int:
        return self.max_batch_tokens

    @property
    def remote(self) -> bool:
        return self.can.remote

    @property
    def where(self) -> str:
        """Its folder or its addresses: a teacher is known by them."""
        return ", ".join(self.urls) if self.remote else self.path

    @property
    def given(self) -> bool:
        """Whether there is a teacher here besides those of by_source."""
        return bool(self.path or self.urls)


Section = TypeVar("Section", bound=EngineConfig, covariant=True)


@dataclass(frozen=True, kw_only=True)
class EngineSpec(Generic[Section]):
    """All that the engines of one role are made of: made once, where a program knows it, and passed on whole.

    Raises ConfigError where no such engine can be.
    """

    path: str  # the model's folder; of a teacher behind HTTP: what teacher.path may be
    config: Section  # the role's settings; what is auto in them has been decided
    vocabulary: Vocabulary  # that the run's models share
    device: str  # cpu | cuda, of this run's own engines
    max_model_tokens: int  # the longest prompt and response together
    trust_remote_code: bool = False  # run Python code that lies in the model's folder
    shares_gpu: bool = False  # with the learner, which has the GPU while the engine sleeps
    returns_hidden: bool = False  # a teacher's scores have its hidden states with them, see loss.payload
    partial_rollouts: bool = False  # it takes new weights in mid-answer, see schedule.partial_rollouts

    def __post_init__(self) -> None:
        section, can = self.config.section, self.config.can
        one_of("device", self.device, DEVICES)
        at_least(f"{section}: max_model_tokens", self.max_model_tokens, 1)
        if self.shares_gpu and not (can.sleeps or can.remote):
            raise ConfigError(
                f"{section}: an engine on the learner's GPU must sleep, so {section}.backend must be "
                f"{backends_that(lambda each: each.sleeps)}, got {self.config.backend}"
            )
        scores_candidates(self.config)
        if self.returns_hidden:
            require_hidden(self.config)

    @property
    def scores_candidates(self) -> bool:
        """Whether `candidate_logprobs` come with the scores."""
        return scores_candidates(self.config)


def teacher_spec(
    config: TeacherConfig,
    *,
    vocabulary: Vocabulary,
    device: str,
    max_model_tokens: int,
    shares_gpu: bool = False,
    returns_hidden: bool = False,
) -> EngineSpec[TeacherConfig]:
    """A teacher's section names its model, too."""
    return EngineSpec(
        path=config.path,
        config=config,
        vocabulary=vocabulary,
        device=device,
        max_model_tokens=max_model_tokens,
        trust_remote_code=config.trust_remote_code,
        shares_gpu=shares_gpu,
        returns_hidden=returns_hidden,
    )


def scores_rows(config: EngineConfig) -> bool:
    """Whether a vLLM engine with these settings scores from hidden states, see `opsd.engines.vllm_rows`."""
    return isinstance(config, TeacherConfig) and config.can.is_vllm and config.scoring == "rows"


def require_hidden(config: EngineConfig) -> None:
    """Raises ConfigError where a teacher with these settings cannot return its hidden states."""
    if not isinstance(config, TeacherConfig) or not config.can.returns_hidden or config.scoring != "rows":
        raise ConfigError(
            f"loss.payload=hidden needs {config.section}.backend="
            f"{backends_that(lambda can: can.returns_hidden)} with {config.section}.scoring=rows: "
            f"got backend={config.backend}, which does not return hidden states"
        )


def scores_candidates(config: EngineConfig) -> bool:
    """Whether an engine with these settings returns log-probabilities at the student's candidates.

    Only a teacher is asked for them. Of a server (http) this is what the client asks for: the server answers the same
    question of its own settings. Raises ConfigError where the settings ask for what the backend cannot.
    """
    if not isinstance(config, TeacherConfig):
        return False
    wanted, able = config.score_candidates, config.can.scores_candidates and config.scoring == "rows"
    if wanted and not able:
        raise ConfigError(
            f"{config.section}.score_candidates=true is not possible with {config.section}.backend={config.backend}, "
            f"{config.section}.scoring={config.scoring}: vLLM's prompt_logprobs name the teacher's top-k alone"
        )
    return able if wanted is None else wanted
