"""Where a method plugs into the loop. The defaults are plain on-policy distillation: every token, equal weight."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opsd.errors import ConfigError
from opsd.ops.divergences import DIVERGENCES
from opsd.types import BatchStats, Selection, StepReport

if TYPE_CHECKING:
    from opsd.config import LossConfig, RunConfig


def select_all(batch: BatchStats) -> Selection:
    """Every token of the batch with weight 1."""
    num_tokens = len(batch.tokens)
    return Selection(index_N=torch.arange(num_tokens), weight_N=torch.ones(num_tokens))


def ignore(report: StepReport) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class TrainHooks:
    """The callables with which a method changes a run; a method replaces the ones that it needs.

    `divergence` travels to the learner's processes, so it must be importable there (a module-level function, or a
    functools.partial of one); the others stay in the driver.
    """

    divergence: Callable[[Tensor, Tensor], Tensor]  # student, teacher bucket log-probs [N, B] -> [N] nats
    select: Callable[[BatchStats], Selection] = select_all
    after_step: Callable[[StepReport], None] = ignore


def build_hooks(cfg: RunConfig) -> TrainHooks:
    """Plain on-policy distillation with the divergence that the config names."""
    return TrainHooks(divergence=bind_divergence(cfg.loss))


def bind_divergence(loss: LossConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence `loss.divergence` with `loss.options` bound. Raises ConfigError for an unknown name or option."""
    return bind_entry("loss.divergence", DIVERGENCES, loss.divergence, "loss.options", loss.options)


def bind_entry(field: str, entries: dict[str, Callable], name: str, options_field: str, options: dict) -> Callable:
    """`entries[name]` with its options bound; a wrong name or option is a ConfigError that lists the right ones."""
    if name not in entries:
        raise ConfigError(f"{field} must be one of {', '.join(sorted(entries))}, got {name!r}")
    known = [p.name for p in inspect.signature(entries[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = ", ".join(known) or "no options"
        raise ConfigError(f"{options_field}: {name!r} takes {takes}, got {', '.join(unknown)}")
    return partial(entries[name], **options)


def load_build_hooks(path: str) -> Callable[[RunConfig], TrainHooks]:
    """The function that `package.module:function` names. Raises ConfigError where there is none."""
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        raise ConfigError(f"hooks must look like package.module:build_hooks, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"hooks={path}: cannot import {module_name}: {error}") from error
    if not hasattr(module, function_name):
        raise ConfigError(f"hooks={path}: {module_name} has no {function_name}")
    return getattr(module, function_name)
