"""How token importance plugs into the training loop: plain distillation's hooks with another `select`, and answers.

A step's tokens pass through filters (which may be selected at all), a score, a selector, and adjustments (weights,
temperatures, inputs of the objective). Each is a function in a dict, named and bound by the configuration.
"""
# T response tokens of the global batch, N kept tokens

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import opsd.hooks
from opsd.errors import ConfigError, StageError
from opsd.hook_checks import HookError, check_selection, check_tokens
from opsd.hooks import TrainHooks, bind_entry
from opsd.ops.losses.objective import PACKED_INPUTS, Objective
from opsd.ops.row_function import name_of
from opsd.ops.signals import STATISTICS, Statistics
from opsd.types import BatchStats, Selection, StepReport, TokenStats
from tip import adjustments, filters, scores
from tip.adaptive import LossDrivenRatio
from tip.adjustments import ADJUSTMENTS
from tip.answers import ANSWERS
from tip.config import SelectorConfig, TipRunConfig
from tip.filters import FILTERS
from tip.low_mass import LowMassWarning, comparing_parts
from tip.scores import SCORES, ScoreOptions
from tip.selectors import SELECTORS

WARM_UP_SHARE = 0.05  # of the steps, in which a ratio that follows the loss stays. AdaKD, arXiv 2510.11615


def build_hooks(cfg: TipRunConfig) -> TrainHooks:
    """The hooks of a TIP run. Raises ConfigError for an unknown name or option, and for a config without selector.

    A run's own module may add to any of the dicts and then call this.
    """
    if not hasattr(cfg, "selector"):
        raise ConfigError("hooks=tip.plugin:build_hooks needs the `selector` settings: start with python -m tip.train")
    plain = opsd.hooks.build_hooks(cfg)
    check_schedule(cfg.selector.schedule, Objective.of(plain.divergence))
    importance = TokenImportance(
        filters=bind_all("filters", FILTERS, cfg.filters),
        score=bind_score(cfg.selector),
        score_options=ScoreOptions(scaling=cfg.selector.scaling, clip_quantile=cfg.selector.clip_quantile),
        selector=bind_selector(cfg.selector),
        adjustments=bind_all("adjust", ADJUSTMENTS, cfg.adjust),
        score_name=cfg.selector.score,
        selector_name=cfg.selector.name,
        warning=LowMassWarning(comparing_parts(cfg)),
        ratio=bind_schedule(cfg),
        objective=Objective.of(plain.divergence),
        seed=cfg.seed,
    )
    of_the_run = {"seed": cfg.seed, "max_tokens": cfg.rollout.max_response_tokens}
    return dataclasses.replace(
        plain,
        statistics=asked_statistics(cfg),
        select=importance.select,
        after_step=importance.after_step,
        rollouts=bind_entry("answers", ANSWERS, cfg.answers, "answer_options", cfg.answer_options, of_the_run),
        state_dict=importance.state_dict,
        load_state_dict=importance.load_state_dict,
    )


class Ratio(Protocol):
    """The share of the tokens that stays, which may follow the loss."""

    @property
    def ratio(self) -> float: ...

    def update(self, loss: float) -> float: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class TokenImportance:
    """The selection of a run. `ratio` is all of its state; what is drawn depends on `seed` and the step alone."""

    filters: dict[str, Callable[[BatchStats], Tensor]]  # by name
    score: Callable[[TokenStats, ScoreOptions], Tensor]
    score_options: ScoreOptions
    selector: Callable[..., Selection]
    adjustments: dict[str, Callable[[BatchStats, Selection], Selection]]  # by name
    score_name: str
    selector_name: str
    warning: LowMassWarning
    ratio: Ratio
    objective: Objective
    seed: int

    def select(self, batch: BatchStats) -> Selection:
        """Raises HookError for an option out of range or a missing input of the loss, StageError for no token.

        What each function returns is looked at, so that the line names the one at fault.
        """
        self.warning.look_at(batch)
        selection = self._select(batch)
        missing = self.objective.inputs - PACKED_INPUTS - selection.inputs.keys()
        if missing:
            raise HookError(f"the loss needs {', '.join(sorted(missing))}, which no entry of `adjust` gives")
        return without_zero_weights(selection)

    def _select(self, batch: BatchStats) -> Selection:
        generator, num_tokens = step_generator(self.seed, batch.step), len(batch.tokens)
        eligible_T = torch.ones(num_tokens, dtype=torch.bool)
        for name, passes in self.filters.items():
            where = f"filters.{name}"
            passes_T = called(where, passes, batch)
            check_tokens(where, passes_T, num_tokens, dtype=torch.bool)
            eligible_T &= passes_T
        where = f"selector.score={self.score_name}"
        options = dataclasses.replace(self.score_options, generator=generator)
        score_T = called(where, self.score, batch.tokens, options)
        check_tokens(where, score_T, num_tokens)
        score_T = score_T[eligible_T]
        lengths = torch.bincount(batch.rollout_T[eligible_T], minlength=len(batch.lengths))
        where = f"selector.name={self.selector_name} (score {self.score_name})"
        selection = called(where, self.selector, score_T, lengths, ratio=self.ratio.ratio, generator=generator)
        check_selection(where, selection, len(score_T))
        selection = dataclasses.replace(selection, index_N=eligible_T.nonzero()[:, 0][selection.index_N])
        for name, adjust in self.adjustments.items():
            where = f"adjust.{name}"
            selection = called(where, adjust, batch, selection)
            check_selection(where, selection, num_tokens)
        return selection

    def after_step(self, report: StepReport) -> None:
        self.ratio.update(report.loss)

    def state_dict(self) -> dict[str, Any]:
        return self.ratio.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ratio.load_state_dict(state)


@dataclass(frozen=True)
class ConstantRatio:
    ratio: float

    def update(self, loss: float) -> float:
        return self.ratio

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def constant(*, initial: float, num_warmup: int = 0) -> Ratio:
    return ConstantRatio(initial)


SCHEDULES: dict[str, Callable[..., Ratio]] = {"constant": constant, "loss_driven": LossDrivenRatio}


def check_schedule(schedule: str, objective: Objective) -> None:
    """Raises ConfigError where the ratio would follow a loss whose value says nothing: that of a policy gradient."""
    without = [loss for _, loss in objective.parts if not loss.has_value]
    if schedule == "loss_driven" and without:
        raise ConfigError(
            f"selector.schedule=loss_driven follows the loss, and only the gradient of {name_of(without[0])} has a "
            "meaning, not its value: set selector.schedule=constant or another loss"
        )


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator for one step, so that a resumed run draws what the unbroken run drew."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def without_zero_weights(selection: Selection) -> Selection:
    """A token of weight 0 costs its share of the head and changes nothing."""
    counts_N = selection.weight_N > 0
    if not counts_N.any():
        raise StageError("select: no token has a weight above 0: the filters and adjustments leave nothing to learn")
    return selection if counts_N.all() else selection.take(counts_N.nonzero()[:, 0])


def called(where: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the function returns; an option out of range, and the like, says where."""
    try:
        return function(*args, **options)
    except ConfigError:
        raise
    except ValueError as error:
        raise HookError(f"{where}: {error}") from error


def bind_all(field: str, entries: dict[str, Callable], chosen: dict[str, dict]) -> dict[str, Callable]:
    return {name: bind_entry(field, entries, name, f"{field}.{name}", options) for name, options in chosen.items()}


def bind_score(cfg: SelectorConfig) -> Callable[[TokenStats, ScoreOptions], Tensor]:
    """Raises ConfigError for an unknown score or option, and for one that does not take what every score is given."""
    name, options_field = cfg.score, "selector.score_options"
    by_place = list(inspect.signature(SCORES[name]).parameters)[:2] if name in SCORES else []
    score = bind_entry("selector.score", SCORES, name, options_field, cfg.score_options, each_call=by_place)
    try:
        inspect.signature(score).bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"selector.score={name}: {name_of(score)} must take (stats, options), as every score does: {error}"
        ) from error
    return score


def asked_statistics(cfg: TipRunConfig) -> Statistics:
    """Those of STATISTICS that the run's functions read: all, where one of a user's own does not say what it reads."""
    chosen = [(scores.READS, [cfg.selector.score]), (filters.READS, cfg.filters), (adjustments.READS, cfg.adjust)]
    read: set[str] = set()
    for reads, names in chosen:
        for name in names:
            read.update(reads.get(name, STATISTICS))
    return {name: function for name, function in STATISTICS.items() if name in read}


def bind_selector(cfg: SelectorConfig) -> Callable[..., Selection]:
    always = {"ratio": cfg.ratio, "scope": cfg.scope, "generator": None}  # ratio, too, is given at each call
    return bind_entry("selector.name", SELECTORS, cfg.name, "selector.name", {}, always)


def bind_schedule(cfg: TipRunConfig) -> Ratio:
    chosen = cfg.selector
    num_warmup = math.ceil(WARM_UP_SHARE * cfg.num_steps)
    options = {"num_warmup": num_warmup, **chosen.schedule_options}
    of_the_run = {"initial": chosen.ratio}
    options_field = "selector.schedule_options"
    make = bind_entry("selector.schedule", SCHEDULES, chosen.schedule, options_field, options, of_the_run)
    try:
        return make()
    except ValueError as error:
        raise ConfigError(f"selector.schedule_options: {error}") from error
