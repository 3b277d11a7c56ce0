"""How many steps some passes over the prompts are."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

from opsd.config.run import RunConfig
from opsd.data.rows import count_rows
from opsd.errors import DataError

Config = TypeVar("Config", bound=RunConfig)


def with_epochs_as_steps(cfg: Config) -> Config:
    """`cfg` with the num_steps that its num_epochs come to, the last step reaching into the next pass where it must.

    Raises DataError where the prompts must be counted and are not there.
    """
    if cfg.num_epochs == 0:
        return cfg
    num_prompts = cfg.num_epochs * count_rows(cfg.data.train_path)
    if num_prompts == 0:
        raise DataError(f"{cfg.data.train_path}: no prompts in it (the file is empty)")
    return dataclasses.replace(cfg, num_epochs=0, num_steps=math.ceil(num_prompts / cfg.data.prompts_per_step))
