"""What the settings' own checks are made of; each raises ConfigError that names the field, expected and got."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from opsd.errors import ConfigError


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} must be greater than 0, got {value}")


def in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be in [{low}, {high}], got {value}")


def function_named(name: str, path: str) -> Callable[..., Any]:
    """The function that the setting's `path`, package.module:function, names; its module is imported."""
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"{name} must look like package.module:function, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name}={path}: cannot import {module_name}: {error}") from error
    if not hasattr(module, function_name):
        raise ConfigError(f"{name}={path}: {module_name} has no {function_name}")
    return getattr(module, function_name)
