"""Which sizes of tensor parallelism a model's heads allow: vLLM's rule, asked before anything starts."""

from types import SimpleNamespace

import pytest

from opsd.config.engine import EngineConfig, RolloutConfig
from opsd.engines.vllm_settings import llm_arguments
from opsd.errors import ConfigError
from opsd.models.tensor_parallel import check_engine_heads, tensor_parallel_sizes


@pytest.mark.parametrize(
    ("heads", "key_heads", "sizes"),
    [(32, 8, [1, 2, 4, 8, 16, 32]), (14, 2, [1, 2, 14]), (9, 3, [1, 3, 9]), (6, 4, [1, 2])],
)
def test_every_gpu_has_whole_heads(heads, key_heads, sizes):
    assert tensor_parallel_sizes(heads, key_heads) == sizes


def shape(**fields):
    config = SimpleNamespace(**fields)
    return SimpleNamespace(get_text_config=lambda: config)


def test_heads_that_cannot_be_shared_are_named_and_a_model_without_any_is_left_to_vllm():
    three = EngineConfig(tensor_parallel_size=3)
    with pytest.raises(ConfigError, match=r"^rollout\.tensor_parallel_size=3 .* 4 attention heads \(2 of keys\) of /m"):
        check_engine_heads("rollout", three, "/m", shape(num_attention_heads=4, num_key_value_heads=2))
    with pytest.raises(ConfigError, match=r"4 attention heads \(4 of keys\) of /m: use one of 1, 2, 4$"):
        check_engine_heads("rollout", three, "/m", shape(num_attention_heads=4))
    check_engine_heads("rollout", three, "/m", shape())
    check_engine_heads("rollout", EngineConfig(), "/m", shape(num_attention_heads=4))


def test_a_transformers_engine_is_one_process():
    with pytest.raises(ConfigError, match=r"rollout\.tensor_parallel_size=2 needs rollout\.backend=vllm"):
        RolloutConfig(backend="transformers", tensor_parallel_size=2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_vllm_starts_its_own_processes_whatever_placement_its_actor_has(device):
    """Its choice in a placement group would be Ray's executor."""
    sizes = {"max_model_tokens": 64, "shares_gpu": False}
    one, two = (llm_arguments(EngineConfig(tensor_parallel_size=n), device, **sizes) for n in (1, 2))
    assert "distributed_executor_backend" not in one
    assert (two["tensor_parallel_size"], two["distributed_executor_backend"]) == (2, "mp")
    if device == "cpu":
        assert 2 * two["kv_cache_memory_bytes"] == one["kv_cache_memory_bytes"] == 2**28
