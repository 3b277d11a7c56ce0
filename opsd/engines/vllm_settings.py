"""What vLLM is started with: from an engine's settings to the arguments of its `LLM`, by device and role.

Measured on CPU only. What is set for GPUs follows vLLM 0.32's sources and has not been run on one.
"""

from __future__ import annotations

from typing import Any

from opsd.engine_config import EngineConfig


def llm_arguments(
    config: EngineConfig, device: str, *, max_model_tokens: int, max_batch_tokens: int | None, shares_gpu: bool
) -> dict[str, Any]:
    """Arguments of vllm.LLM, but for the model's path. `device`: cpu or cuda; the others: as in VllmEngine."""
    max_model_len = max_model_tokens + 1  # scoring samples one token after the response
    arguments = {
        "skip_tokenizer_init": True,
        "dtype": config.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_logprobs": -1,
        # Little to save where answers are longer than prompts; scoring needs every prefill, and a cached block
        # would outlive a weight update.
        "enable_prefix_caching": False,
        "seed": 0,
        "use_tqdm_on_load": False,
        "enable_sleep_mode": shares_gpu,
        "worker_extension_cls": "opsd.engines.vllm_extension.WeightUpdateExtension",
        **(_cpu_arguments(config) if device == "cpu" else _gpu_arguments(config)),
        **_parallel_arguments(config),
    }
    if max_batch_tokens is not None:  # vLLM does not budget for a scoring step's float32 logits [tokens, V]
        arguments["max_num_batched_tokens"] = max(max_batch_tokens, config.max_num_seqs, max_model_len)
    return arguments


def _cpu_arguments(config: EngineConfig) -> dict[str, Any]:
    return {
        "enforce_eager": True,
        # Without it vLLM claims nearly all memory. It is each process's own.
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30 / config.tensor_parallel_size),
        # A prompt that is prefilled in parts and has a seed crashes vLLM 0.32 on CPU, whose generators cannot rewind.
        "enable_chunked_prefill": False,
    }


def _gpu_arguments(config: EngineConfig) -> dict[str, Any]:
    over_nccl = getattr(config, "weight_transfer", None) == "nccl"  # a teacher has no such setting
    return {
        "weight_transfer_config": {"backend": "nccl"} if over_nccl else None,
        "gpu_memory_utilization": config.gpu_memory_utilization,
    }


def _parallel_arguments(config: EngineConfig) -> dict[str, Any]:
    """vLLM's own processes, children of the engine's: left to itself in an actor of a placement group it takes its Ray
    executor, which refuses a bundle of several GPUs and would not see the engine's environment."""
    if config.tensor_parallel_size == 1:
        return {}
    return {"tensor_parallel_size": config.tensor_parallel_size, "distributed_executor_backend": "mp"}
