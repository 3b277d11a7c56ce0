"""What runs inside each of vLLM's workers, one per rank of tensor parallelism: new weights into the running model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from opsd.engines.lifetime import end_with_parent


class WeightUpdateExtension:
    """Mixed into vLLM's worker class by name (`worker_extension_cls`); called through `collective_rpc`."""

    reload_weights: Callable[..., None]  # this and the next are the worker's
    model_runner: Any

    def __new__(cls, *_, **__) -> WeightUpdateExtension:
        """vLLM makes its worker: from here on, before a weight is loaded, its process ends with the engine's."""
        end_with_parent()
        return super().__new__(cls)

    def replace_weights(self, named: dict[str, Tensor]) -> None:
        """Load a full Hugging Face state dict, without a tied `lm_head`, into the running model, in place.

        `model.load_weights` would leave a CPU model half written, since its linear weights have been repacked;
        `reload_weights` unpacks, loads and repacks. Not so a tied `lm_head`: its packed copy of the embedding would
        silently keep the old values, so on CPU the head is packed anew (an untied head: once more, the same).
        Every rank is given all weights and keeps its share.
        """
        from vllm.platforms import current_platform

        self.reload_weights(weights_iterator=iter(named.items()))
        if current_platform.is_cpu():
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
            from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

            for module in self.model_runner.get_model().modules():  # the head may lie within a multimodal wrapper
                if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                    dispatch_cpu_unquantized_gemm(module, remove_weight=False)
