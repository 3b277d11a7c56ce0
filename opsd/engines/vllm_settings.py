"""What vLLM is started with: from an engine's settings to the arguments of its `LLM`, by device and role.

Measured on CPU only. What is set for GPUs follows vLLM 0.32's sources and has not been run on one.
"""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from opsd.config.engine import EngineConfig, RolloutConfig, TeacherConfig, scores_rows
from opsd.errors import ConfigError


def llm_arguments(config: EngineConfig, device: str, *, max_model_tokens: int, shares_gpu: bool) -> dict[str, Any]:
    """Arguments of vllm.LLM, but for the model's path and its code. What they follow from: see EngineSpec.

    Raises ConfigError for an entry of engine_args that is decided here.
    """
    max_model_len = max_model_tokens + 1  # scoring samples one token after the response
    arguments = {
        "skip_tokenizer_init": True,
        "dtype": config.dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_logprobs": -1,
        "enable_prefix_caching": caches_prefixes(config, device),
        "seed": 0,
        "use_tqdm_on_load": False,
        "enable_sleep_mode": shares_gpu,
        "worker_extension_cls": "opsd.engines.vllm_extension.WorkerExtension",
        **(_cpu_arguments(config) if device == "cpu" else _gpu_arguments(config, shares_gpu)),
        **_parallel_arguments(config),
    }
    if config.scoring_bound is not None:  # vLLM does not budget for a scoring step's float32 logits [tokens, V]
        arguments["max_num_batched_tokens"] = max(config.scoring_bound, config.max_num_seqs, max_model_len)
    ours = sorted({"model", "trust_remote_code", *arguments} & config.engine_args.keys())
    if ours:
        raise ConfigError(
            f"{config.section}.engine_args.{ours[0]} is not to be set there: it follows from the other settings"
        )
    return {**arguments, **config.engine_args}


def check_engine_args(config: EngineConfig) -> None:
    """Raises ConfigError for a name in engine_args that this vLLM does not have. Imports vLLM."""
    if not config.engine_args:
        return
    from vllm.engine.arg_utils import EngineArgs

    known = [field.name for field in fields(EngineArgs)]
    for name in config.engine_args:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{config.section}.engine_args.{name}: vLLM has no such argument{hint}")


def head_settings(config: EngineConfig, device: str) -> dict[str, Any]:
    """What vLLM is to change in the model's config.json: logits of bfloat16 models are summed and kept in float32.

    In bfloat16 a logit near 20 is off by 0.06. On a GPU the product costs no more; on the CPU it copies the head at
    every step, which scoring alone is worth. vLLM refuses it for a quantised head.
    """
    in_float32 = device == "cuda" or scores_rows(config)
    if config.dtype == "float32" or not in_float32 or "quantization" in config.engine_args:
        return {}
    return {"head_dtype": "float32"}


def caches_prefixes(config: EngineConfig, device: str) -> bool:
    """Whether prompts that begin alike share their keys and values: the several answers to one prompt do.

    Never in scoring: it needs every row of a prompt. Not on the CPU: there a prompt's prefill would then depend on what
    came before it, in the last bits, and a run's numbers would no longer be those of the same run started anew.
    """
    return device == "cuda" and not isinstance(config, TeacherConfig)


def sleep_level(config: EngineConfig) -> int:
    """How deep an engine sleeps while the learner has its GPU: 1 keeps its weights in host memory, 2 drops them.

    The student's are replaced before its next answer; a teacher keeps its own.
    """
    return 2 if isinstance(config, RolloutConfig) else 1


def _cpu_arguments(config: EngineConfig) -> dict[str, Any]:
    return {
        "enforce_eager": True,
        # Without it vLLM claims nearly all memory. It is each process's own.
        "kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30 / config.tensor_parallel_size),
        # A prompt that is prefilled in parts and has a seed crashes vLLM 0.32 on CPU, whose generators cannot rewind.
        "enable_chunked_prefill": False,
    }


def _gpu_arguments(config: EngineConfig, shares_gpu: bool) -> dict[str, Any]:
    transfer = config.weight_transfer if isinstance(config, RolloutConfig) else "object_store"
    return {
        "weight_transfer_config": {"backend": transfer} if transfer in ("nccl", "ipc") else None,
        "gpu_memory_utilization": config.gpu_share(colocated=shares_gpu),
    }


def _parallel_arguments(config: EngineConfig) -> dict[str, Any]:
    """vLLM's own processes, children of the engine's: left to itself in an actor of a placement group it takes its Ray
    executor, which refuses a bundle of several GPUs and would not see the engine's environment."""
    if config.tensor_parallel_size == 1:
        return {}
    return {"tensor_parallel_size": config.tensor_parallel_size, "distributed_executor_backend": "mp"}
