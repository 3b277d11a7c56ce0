"""device=auto and dtype=auto, the programs' defaults, become what they mean here; all else sees concrete values."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from opsd.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

AUTO = {"cpu": "float32", "cuda": "bfloat16"}

Config = TypeVar("Config", bound="DataclassInstance")


def resolve_device(device: str) -> str:
    """cpu or cuda. Raises ConfigError where cuda is asked for and there is none.

    In a Ray cluster the command may be started on a node without GPUs, so there cuda is taken at its word.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not joins_cluster() and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but this machine shows no CUDA device")
    return device


def joins_cluster() -> bool:
    """Whether the run goes to a Ray cluster that is there already."""
    return "RAY_ADDRESS" in os.environ


def with_dtypes(cfg: Config, device: str) -> Config:
    """`cfg` with bfloat16 on a GPU, float32 on the CPU, wherever a section's dtype is auto. `device`: cpu or cuda."""
    sections = {field.name: getattr(cfg, field.name) for field in fields(cfg)}
    decided = {name: _decided(section, AUTO[device]) for name, section in sections.items() if is_dataclass(section)}
    return replace(cfg, **decided)


def planned_device(device: str) -> str:
    """cpu or cuda, as a run would have it; cuda is taken at its word, so that one without GPUs can be planned here."""
    return device if device == "cuda" else resolve_device(device)


def _decided(section: Any, dtype: str) -> Any:
    changes: dict[str, Any] = {"dtype": dtype} if getattr(section, "dtype", None) == "auto" else {}
    if getattr(section, "by_source", None):  # settings of other teachers, by data_source
        auto = [s for s, own in section.by_source.items() if isinstance(own, dict) and own.get("dtype") == "auto"]
        own = {source: {**section.by_source[source], "dtype": dtype} for source in auto}
        changes["by_source"] = {**section.by_source, **own}
    return replace(section, **changes) if changes else section
