"""Where a method plugs into the loop. The defaults are plain on-policy distillation: every token, equal weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opsd.config.checks import function_named
from opsd.errors import ConfigError
from opsd.ops.losses.importance import corrected
from opsd.ops.losses.objective import Loss, Objective
from opsd.ops.losses.table import LOSSES, REFUSED, UNBIASED
from opsd.ops.row_function import name_of
from opsd.ops.signals import Statistics
from opsd.types import BatchStats, Rollout, Selection, StepReport

if TYPE_CHECKING:
    from opsd.config.loss import LossConfig
    from opsd.config.run import RunConfig
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

    `divergence` and `statistics` travel to the learner's processes, so they must be importable there (a module-level
    function, a functools.partial of one, or a Loss, RowFunction or Objective of such); the others stay in the driver. A
    method that remembers something from step to step hands it out and takes it back through `state_dict` and
    `load_state_dict`: it is saved with every checkpoint, as JSON.
    """

    divergence: Callable[..., Tensor]  # student, teacher bucket log-probs [N, B], row inputs -> [N]; see Objective
    # What the selection reads beside the statistics of every run.
    statistics: Statistics = field(default_factory=dict)
    select: Callable[[BatchStats], Selection] = select_all
    after_step: Callable[[StepReport], None] = ignore
    # With schedule.max_staleness the groups are taken in another thread: a source that asks its engines when it is
    # called, and not when its groups are taken, gives the same answers each time.
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
    known = {name: Loss.of(entry) for name, entry in LOSSES.items()}
    alone = {name: entry for name, entry in known.items() if not entry.only_beside}
    if loss.residual:
        if loss.divergence not in UNBIASED:
            raise ConfigError(
                f"loss.residual=true needs loss.divergence={' or '.join(UNBIASED)}, got {loss.divergence}: other "
                "divergences have no such form"
            )
        alone |= UNBIASED
    parts = [(1.0, bind_loss("loss.divergence", alone, loss.divergence, "loss.options", loss.options))]
    for name, settings in loss.terms.items():
        options = {key: value for key, value in settings.items() if key != "weight"}
        parts.append((settings["weight"], bind_loss("loss.terms", known, name, f"loss.terms.{name}", options)))
    if loss.importance_cap:
        parts = [(weight, corrected(part, loss.importance_cap)) for weight, part in parts]
    return Objective(parts=tuple(parts))


def bind_loss(field: str, entries: dict[str, Loss], name: str, options_field: str, options: dict) -> Loss:
    """`entries[name]` with its options bound."""
    functions = {each: entry.function for each, entry in entries.items()}
    inputs = (*entries[name].inputs, *entries[name].row_values) if name in entries else ()
    function = bind_entry(field, functions, name, options_field, options, each_call=inputs)
    return replace(entries[name], function=function, setting=options_field if options else f"{field}={name}")


def bind_entry(
    field: str,
    entries: Mapping[str, Callable],
    name: str,
    options_field: str,
    options: dict,
    always: dict | None = None,
    *,
    each_call: Collection[str] = (),
) -> Callable:
    """`entries[name]` with its options bound; a wrong name or option is a ConfigError that lists the right ones.

    `options` are what the user gave, `always` what every entry of the dict gets: one that cannot take these was written
    for another dict or without them, and is told so. **options takes anything. `each_call`: the keyword arguments that
    are no options, as every call brings them.
    """
    if name not in entries:
        raise ConfigError(f"{field} must be one of {', '.join(sorted(entries))}, got {name!r}")
    always = always or {}
    parameters = inspect.signature(entries[name]).parameters.values()
    given = {*each_call, *always}
    known = {p.name: p for p in parameters if _is_option(p) and p.name not in given}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes = ", ".join(known) or "no options"
        lacking = sorted(given - {p.name for p in parameters})
        if lacking:
            raise ConfigError(
                f"{field}={name}: {name_of(entries[name])} must take the keyword arguments "
                f"{', '.join(sorted(given))} (or **options), which every call gives; it takes {takes}"
            )
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(f"{options_field}: {name!r} takes {takes}, got {', '.join(unknown)}")
    missing = [each for each, p in known.items() if p.default is p.empty and each not in options]
    if missing:
        raise ConfigError(f"{options_field}: {name!r} needs {', '.join(missing)}")
    for option, value in options.items():
        if option in known:
            _check_kind(f"{options_field}.{option}", value, known[option])
    return partial(entries[name], **{**options, **always})


def _is_option(parameter: inspect.Parameter) -> bool:
    """Whether it can be bound by name and is none of the arguments by place of each call."""
    if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
        return parameter.default is not parameter.empty
    return parameter.kind is parameter.KEYWORD_ONLY


KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "str": ((str,), "a text"),
}


def _check_kind(option: str, value: Any, parameter: inspect.Parameter) -> None:
    """Raises ConfigError for a text in place of a number, and the like.

    The kind is what the parameter is annotated with, else that of its default, whose number may have been written
    without a point; where neither is one of KINDS the value may be anything.
    """
    annotation = parameter.annotation
    kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    if kind not in KINDS:
        kind = type(parameter.default).__name__
        kind = "float" if kind == "int" else kind
    if kind in KINDS:
        kinds, wanted = KINDS[kind]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{option} must be {wanted}, got {value!r}")


def load_build_hooks(path: str) -> Callable[[RunConfig], TrainHooks]:
    """The function that `package.module:function` names. Raises ConfigError where there is none that takes a config."""
    return function_named("hooks", path, takes="config")
