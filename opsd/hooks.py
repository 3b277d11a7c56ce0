"""Where a method plugs into the loop. The defaults are plain on-policy distillation: every token, equal weight."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opsd.errors import ConfigError
from opsd.ops.losses.divergences import DIVERGENCES
from opsd.ops.losses.objective import OBJECTIVES, REFUSED, Objective, is_row_input, name_of
from opsd.ops.losses.terms import TERMS
from opsd.types import BatchStats, Rollout, Selection, StepReport

if TYPE_CHECKING:
    from opsd.config.run import LossConfig, RunConfig
    from opsd.rollout import RolloutPool
    from opsd.teacher.router import Teacher

# (prompts, *, samples_per_prompt, step) -> groups of rollouts by place, as RolloutPool.sample
RolloutSource = Callable[..., Iterable[dict[int, Rollout]]]


def select_all(batch: BatchStats) -> Selection:
    """Every token of the batch with weight 1."""
    num_tokens = len(batch.tokens)
    return Selection(index_N=torch.arange(num_tokens), weight_N=torch.ones(num_tokens))


def ignore(_: Any) -> None:
    pass


def student_answers(rollout_pool: RolloutPool, teacher_pool: Teacher) -> RolloutSource:
    """Every answer of the batch is the current student's: on-policy."""
    return rollout_pool.sample


@dataclass(frozen=True, kw_only=True)
class TrainHooks:
    """The callables with which a method changes a run; a method replaces the ones that it needs.

    `divergence` travels to the learner's processes, so it must be importable there (a module-level function, a
    functools.partial of one, or an Objective of such); the others stay in the driver. A method that remembers
    something from step to step hands it out and takes it back through `state_dict` and `load_state_dict`: it is saved
    with every checkpoint, as JSON.
    """

    divergence: Callable[..., Tensor]  # student, teacher bucket log-probs [N, B], row inputs -> [N]; see Objective
    select: Callable[[BatchStats], Selection] = select_all
    after_step: Callable[[StepReport], None] = ignore
    rollouts: Callable[[RolloutPool, Teacher], RolloutSource] = student_answers
    state_dict: Callable[[], dict[str, Any]] = dict
    load_state_dict: Callable[[dict[str, Any]], None] = ignore


def build_hooks(cfg: RunConfig) -> TrainHooks:
    """Plain on-policy distillation with the divergence that the config names."""
    return TrainHooks(divergence=bind_objective(cfg.loss))


def bind_objective(loss: LossConfig) -> Objective:
    """The loss with its options, and the terms with theirs. Raises ConfigError for an unknown name or option."""
    if loss.divergence in REFUSED:
        raise ConfigError(f"loss.divergence={loss.divergence}: {REFUSED[loss.divergence]}")
    known = {**DIVERGENCES, **OBJECTIVES}
    parts = [(1.0, bind_entry("loss.divergence", known, loss.divergence, "loss.options", loss.options))]
    for name, settings in loss.terms.items():
        options = {key: value for key, value in settings.items() if key != "weight"}
        parts.append((settings["weight"], bind_entry("loss.terms", TERMS, name, f"loss.terms.{name}", options)))
    return Objective(parts=tuple(parts))


def bind_entry(
    field: str,
    entries: dict[str, Callable],
    name: str,
    options_field: str,
    options: dict,
    always: dict | None = None,
) -> Callable:
    """`entries[name]` with its options bound; a wrong name or option is a ConfigError that lists the right ones.

    `options` are what the user gave, `always` what every entry of the dict gets: one that cannot take these was written
    for another dict or without them, and is told so. **options takes anything.
    """
    if name not in entries:
        raise ConfigError(f"{field} must be one of {', '.join(sorted(entries))}, got {name!r}")
    always = always or {}
    parameters = inspect.signature(entries[name]).parameters.values()
    known = [p.name for p in parameters if _is_option(p)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes = ", ".join(known) or "no options"
        lacking = sorted(set(always) - set(known))
        if lacking:
            raise ConfigError(
                f"{field}={name}: {name_of(entries[name])} must take the keyword arguments {', '.join(sorted(always))} "
                f"(or **options), as every entry does; it takes {takes}"
            )
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(f"{options_field}: {name!r} takes {takes}, got {', '.join(unknown)}")
    return partial(entries[name], **{**always, **options})


def _is_option(parameter: inspect.Parameter) -> bool:
    """Whether it can be bound by name and is none of the arguments of each call."""
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
        return parameter.default is not parameter.empty
    return parameter.kind is parameter.KEYWORD_ONLY and not is_row_input(parameter)


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
