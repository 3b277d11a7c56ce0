"""What the settings' own checks are made of; each raises ConfigError that names the field, expected and got."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from opsd.errors import ConfigError

LONGEST_WAIT_S = 1e9  # thirty years; Python's own waits and sockets fail at ten times that


def check_values(settings: Any, prefix: str = "") -> None:
    """What no setting may be, of a whole config with its sections, lists and mappings: called once by each program's.

    Every number must be finite and, where it is whole, fit in 64 bits; every text must be one that a file can hold.
    """
    for field in fields(settings):
        _check_value(f"{prefix}{field.name}", getattr(settings, field.name))


def _check_value(name: str, value: Any) -> None:
    if is_dataclass(value):
        check_values(value, f"{name}.")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_value(f"{name}: the name {key!r}", key)
            _check_value(f"{name}.{key}", item)
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            _check_value(f"{name}[{place}]", item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    elif isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(f"{name} must fit in 64 bits, got a number of {value.bit_length()} bits")
    elif isinstance(value, str) and ("\0" in value or _has_surrogate(value)):
        raise ConfigError(f"{name} must be text without NUL and without halves of surrogate pairs, got {value!r}")


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


def positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(f"{name} must be greater than 0, got {value}")


def in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{name} must be in [{low}, {high}], got {value}")


def share_above_0(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{name} must be in (0, 1], got {value}")


def seconds(name: str, value: float) -> None:
    """How long something waits."""
    if not 0 < value <= LONGEST_WAIT_S:
        raise ConfigError(f"{name} must be greater than 0 and at most {LONGEST_WAIT_S:g} seconds, got {value}")


def function_named(name: str, path: str, takes: str, by_name: Iterable[str] = ()) -> Callable[..., Any]:
    """The function that the setting's `path`, package.module:function, names; its module is imported.

    `takes`: what it is called with, by place: "config", or "response, reference answer". `by_name`: beside these.
    """
    module_name, _, function_name = path.partition(":")
    if not module_name or module_name.startswith(".") or not function_name:
        raise ConfigError(f"{name} must look like package.module:function, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"{name}={path}: cannot import {module_name}: {error}") from error
    if not hasattr(module, function_name):
        raise ConfigError(f"{name}={path}: {module_name} has no {function_name}")
    function = getattr(module, function_name)
    require_function(f"{name}={path}", function, takes, by_name)
    return function


def require_function(where: str, function: Any, takes: str, by_name: Iterable[str] = ()) -> None:
    """Raises ConfigError where `function` is none, or cannot be called with what `takes` lists, by place."""
    takes_all = ", ".join([*filter(None, [takes]), *(f"{name}=" for name in by_name)])
    if not callable(function):
        raise ConfigError(f"{where} must be a function of ({takes_all}), got {type(function).__name__}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # one written in C may not say what it takes
        return
    try:
        signature.bind(*filter(None, takes.split(", ")), **dict.fromkeys(by_name))
    except TypeError as error:
        raise ConfigError(f"{where} must be a function of ({takes_all}): {error}") from error
