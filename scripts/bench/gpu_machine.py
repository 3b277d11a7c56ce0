"""What gpu_check.py ran on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy", "flash-attn", "vllm", "ray")


def facts(*, device: str) -> dict[str, str | int]:
    found: dict[str, str | int] = {"python": platform.python_version(), "num_gpus": torch.cuda.device_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 1e9, 1)}
        found |= {"cuda": str(torch.version.cuda), "compute_capability": f"{properties.major}.{properties.minor}"}
    return found
