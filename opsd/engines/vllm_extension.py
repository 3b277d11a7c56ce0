"""What runs inside each of vLLM's workers, one per rank of tensor parallelism: new weights, scores of response rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from opsd.engines.lifetime import end_with_parent
from opsd.engines.vllm_rows import ResponseRows
from opsd.types import Rollout, TeacherScores, Vocabulary


class WorkerExtension:
    """Mixed into vLLM's worker class by name (`worker_extension_cls`); called through `collective_rpc`."""

    reload_weights: Callable[..., None]  # this and the next two are the worker's
    model_runner: Any
    rank: int
    response_rows: ResponseRows | None = None

    def __new__(cls, *_, **__) -> WorkerExtension:
        """vLLM makes its worker: from here on, before a weight is loaded, its process ends with the engine's."""
        end_with_parent()
        return super().__new__(cls)

    def expect_scores(
        self, rollouts: Mapping[str, Rollout], top_k: int, vocabulary: Vocabulary, keeps_hidden: bool
    ) -> None:
        """Before the requests of these names run: see ResponseRows."""
        if self.response_rows is None:
            self.response_rows = ResponseRows(self.model_runner, keeps_scores=self.rank == 0)
        self.response_rows.expect(rollouts, top_k, vocabulary, keeps_hidden=keeps_hidden)

    def take_scores(self) -> dict[str, TeacherScores]:
        """By name, when they have run; of the first rank, the others have none."""
        assert self.response_rows is not None, "expect_scores comes first"
        return self.response_rows.take()

    def replace_weights(self, named: dict[str, Tensor]) -> None:
        """Load a full Hugging Face state dict, without a tied `lm_head`, into the running model, in place.

        `model.load_weights` would leave a CPU model half written, since its linear weights have been repacked;
        `reload_weights` unpacks, loads and repacks. Not so a tied `lm_head`, whose packed copy of the embedding would
        silently keep the old values, and a mixture's experts: see `pack_anew`.
        Every rank is given all weights and keeps its share.
        """
        from vllm.platforms import current_platform

        self.reload_weights(weights_iterator=iter(named.items()))
        if current_platform.is_cpu():
            pack_anew(self.model_runner.get_model())


def pack_anew(model: nn.Module) -> None:
    """What vLLM's CPU build packs when it loads a model and forgets when it reloads one: heads, a mixture's experts.

    Experts would be read as if they were packed, so that not even the same weights gave the same answers.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():  # the head may lie within a multimodal wrapper
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
