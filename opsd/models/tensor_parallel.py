"""How many GPUs (or processes) one vLLM engine can be spread over: each gets whole attention heads."""

from __future__ import annotations

from transformers import PreTrainedConfig

from opsd.config.engine import EngineConfig
from opsd.errors import ConfigError


def tensor_parallel_sizes(num_heads: int, num_key_heads: int) -> list[int]:
    """Every size that vLLM takes; heads of keys are repeated where they are fewer than GPUs."""
    whole = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
    return [n for n in whole if num_key_heads % n == 0 or n % num_key_heads == 0]


def check_tensor_parallel(section: str, size: int, path: str, num_heads: int, num_key_heads: int) -> None:
    """Raises ConfigError where the model's heads cannot be shared among `size` GPUs."""
    sizes = tensor_parallel_sizes(num_heads, num_key_heads)
    if size not in sizes:
        raise ConfigError(
            f"{section}.tensor_parallel_size={size} does not divide the {num_heads} attention heads "
            f"({num_key_heads} of keys) of {path}: use one of {', '.join(map(str, sizes))}"
        )


def check_engine_heads(section: str, engine: EngineConfig, path: str, config: PreTrainedConfig) -> None:
    """As check_tensor_parallel, from a model's config; one that names no heads is left to vLLM."""
    shape = config.get_text_config()
    num_heads = getattr(shape, "num_attention_heads", None)
    if engine.tensor_parallel_size > 1 and num_heads:
        num_key_heads = getattr(shape, "num_key_value_heads", None) or num_heads
        check_tensor_parallel(section, engine.tensor_parallel_size, path, num_heads, num_key_heads)
