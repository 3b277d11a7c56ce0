"""The settings of the engines: the student's for rollouts, the teacher's for scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opsd.checks import at_least, in_range, one_of, positive
from opsd.errors import ConfigError
from opsd.remote_config import REMOTE_BACKENDS, HttpConfig, check_url

DTYPES = ("auto", "float32", "bfloat16")
ENGINES = ("vllm", "transformers")


@dataclass
class EngineConfig:
    """What the rollout engines and the teacher's engines have in common."""

    backend: str = "vllm"  # vllm | transformers
    num_workers: int = 1  # Ray actors, each a whole engine
    # float32 | bfloat16 | auto, the programs' own default: bfloat16 on a GPU, float32 on the CPU
    dtype: str = "float32"
    tensor_parallel_size: int = 1  # GPU only
    gpu_memory_utilization: float = 0.7  # GPU only
    kv_cache_gib: float = 0.25  # CPU only
    max_num_seqs: int = 256  # sequences in flight in one engine
    cpu_threads: int = 1  # CPU only; more than one slows a tiny model down

    section = "engine"
    backends = ENGINES

    def __post_init__(self) -> None:
        one_of(f"{self.section}.backend", self.backend, self.backends)
        one_of(f"{self.section}.dtype", self.dtype, DTYPES)
        in_range(f"{self.section}.gpu_memory_utilization", self.gpu_memory_utilization, 0.0, 1.0)
        positive(f"{self.section}.kv_cache_gib", self.kv_cache_gib)
        for name in ("num_workers", "tensor_parallel_size", "max_num_seqs", "cpu_threads"):
            at_least(f"{self.section}.{name}", getattr(self, name), 1)


@dataclass
class RolloutConfig(EngineConfig):
    max_response_tokens: int = 512  # a longer answer is cut there
    temperature: float = 1.0  # at which the student samples its answers
    top_p: float = 1.0  # they are drawn from the likeliest tokens that have this probability together
    num_candidates: int = 32  # C: the student's own likeliest tokens that travel with each token
    weight_transfer: str = "object_store"  # object_store | nccl (GPU only): how new weights reach the engines
    group_size: int = 32  # the teacher gets finished rollouts of an engine in groups of this size, at once

    section = "rollout"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("rollout.weight_transfer", self.weight_transfer, ("object_store", "nccl"))
        positive("rollout.temperature", self.temperature)
        in_range("rollout.top_p", self.top_p, 0.0, 1.0)
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
    trust_remote_code: bool = False  # run Python code that lies in the model's folder
    attention: bool = False  # also return the attention paid to each token; transformers only, slow, much memory
    follow_decay: float | None = None  # d: the teacher is a running mean of the student, d old + (1 - d) new a step
    max_batch_tokens: int = 8192  # prompt and response tokens scored in one engine step; bounds its memory

    section = "teacher"
    backends = (*ENGINES, *REMOTE_BACKENDS)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("teacher.top_k", self.top_k, 1)
        at_least("teacher.max_batch_tokens", self.max_batch_tokens, 1)
        for url in self.urls:
            check_url("teacher.urls", url)
        if bool(self.urls) != self.remote:
            raise ConfigError(
                f"teacher.urls and teacher.backend={' or '.join(REMOTE_BACKENDS)} need each other, "
                f"got teacher.backend={self.backend} with {len(self.urls)} urls"
            )
        if self.attention and self.backend != "transformers":
            raise ConfigError(
                "teacher.attention=true needs teacher.backend=transformers: a vLLM engine never forms attention weights"
                ", and a server sends none"
            )
        if self.follow_decay is not None:
            in_range("teacher.follow_decay", self.follow_decay, 0.0, 1.0)
            if self.remote or self.by_source:
                raise ConfigError(
                    "teacher.follow_decay needs one teacher in this run (backend vllm or transformers, no by_source): "
                    "a server keeps its weights"
                )

    @property
    def remote(self) -> bool:
        return self.backend in REMOTE_BACKENDS

    @property
    def given(self) -> bool:
        """Whether there is a teacher here besides those of by_source."""
        return bool(self.path or self.urls)
