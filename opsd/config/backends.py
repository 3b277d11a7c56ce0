"""What the engines behind each value of `backend` can do: one table, which every question about a backend reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What one backend can do. A new question is a field here and an answer in the table, never a name compared."""

    remote: bool = False  # servers elsewhere, at teacher.urls: settings of a run's own engines mean nothing to them
    is_vllm: bool = False  # vLLM in processes of the run: it must be installed there, and takes engine_args
    # A teacher returns log-probabilities at the student's candidates. A server answers for itself.
    scores_candidates: bool = False
    returns_hidden: bool = False  # a teacher's hidden states can travel to the learner, loss.payload=hidden
    reads_embeddings: bool = False  # scores inputs between two sequences (Rollout.mixture), not token ids only
    returns_attention: bool = False  # the attention paid to each token (TeacherScores.attention)
    splits_layers: bool = False  # one engine over several GPUs, tensor_parallel_size
    reserves_cache: bool = False  # keys and values get a fixed room when the engine starts, in gpu_memory_utilization
    sleeps: bool = False  # gives its GPU's memory back between two calls, as placement.mode=colocated needs
    weight_transfers: tuple[str, ...] = ()  # ways in which new weights can reach it while it runs

    @property
    def takes_weights(self) -> bool:
        return bool(self.weight_transfers)


CAPABILITIES = {
    "vllm": Capabilities(
        is_vllm=True,
        scores_candidates=True,
        returns_hidden=True,
        splits_layers=True,
        reserves_cache=True,
        sleeps=True,
        weight_transfers=("object_store", "nccl", "ipc"),
    ),
    "transformers": Capabilities(
        scores_candidates=True,
        returns_hidden=True,
        reads_embeddings=True,
        returns_attention=True,
        weight_transfers=("object_store",),
    ),
    "http": Capabilities(remote=True, scores_candidates=True, returns_hidden=True),
    "openai": Capabilities(remote=True),  # `vllm serve` names its own top-k and nothing else
}

ENGINES = tuple(name for name, can in CAPABILITIES.items() if not can.remote)
REMOTE_BACKENDS = tuple(name for name, can in CAPABILITIES.items() if can.remote)


def backends_that(can: Callable[[Capabilities], object]) -> str:
    """The names of the backends of which this is true, for messages: "vllm or transformers"."""
    return " or ".join(name for name, capabilities in CAPABILITIES.items() if can(capabilities))
