"""How token importance plugs into the training loop: plain distillation's hooks with another `select`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

import opsd.hooks
from opsd.errors import ConfigError
from opsd.hooks import TrainHooks, bind_entry
from opsd.types import BatchStats, Selection
from tip.config import SelectorConfig, TipRunConfig
from tip.scores import SCORES
from tip.selectors import SELECTORS


def build_hooks(cfg: TipRunConfig) -> TrainHooks:
    """The hooks of a TIP run. Raises ConfigError for an unknown score or selector, and for a config without selector.

    A run's own module may add to SCORES or SELECTORS and then call this.
    """
    if not hasattr(cfg, "selector"):
        raise ConfigError("hooks=tip.plugin:build_hooks needs the `selector` settings: start with python -m tip.train")
    select = partial(select_tokens, score=bind_score(cfg.selector), selector=bind_selector(cfg.selector), seed=cfg.seed)
    return dataclasses.replace(opsd.hooks.build_hooks(cfg), select=select)


def select_tokens(
    batch: BatchStats, *, score: Callable[..., Tensor], selector: Callable[..., Selection], seed: int
) -> Selection:
    """Score every token of the global batch, then select. What is drawn depends on `seed` and the step alone."""
    generator = step_generator(seed, batch.step)
    return selector(score(batch.tokens, generator=generator), batch.lengths, generator=generator)


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator for one step, so that a resumed run draws what the unbroken run drew."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def bind_score(cfg: SelectorConfig) -> Callable[..., Tensor]:
    # generator is given anew at each call; None stands here so that an entry without it is refused at start-up.
    options = {"scaling": cfg.scaling, "clip_quantile": cfg.clip_quantile, "generator": None}
    return bind_entry("selector.score", SCORES, cfg.score, "selector.score", options)


def bind_selector(cfg: SelectorConfig) -> Callable[..., Selection]:
    options = {"ratio": cfg.ratio, "scope": cfg.scope, "generator": None}
    return bind_entry("selector.name", SELECTORS, cfg.name, "selector.name", options)
