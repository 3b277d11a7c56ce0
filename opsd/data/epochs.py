"""How many steps some passes over the prompts are."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TypeVar

import pyarrow.parquet

from opsd.config.run import RunConfig
from opsd.data.rows import read_lines
from opsd.errors import DataError

Config = TypeVar("Config", bound=RunConfig)


def count_prompts(path: str) -> int:
    """Rows of a JSONL file (blank lines aside) or of a parquet file. Raises DataError where there is no such file."""
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file")
    if path.endswith(".parquet"):
        return pyarrow.parquet.read_metadata(path).num_rows
    return sum(bool(line.strip()) for line in read_lines(path))


def with_epochs_as_steps(cfg: Config) -> Config:
    """`cfg` with the num_steps that its num_epochs come to, the last step reaching into the next pass where it must.

    Raises DataError where the prompts must be counted and are not there.
    """
    if cfg.num_epochs == 0:
        return cfg
    num_prompts = cfg.num_epochs * count_prompts(cfg.data.train_path)
    if num_prompts == 0:
        raise DataError(f"{cfg.data.train_path}: no prompts in it (the file is empty)")
    return dataclasses.replace(cfg, num_epochs=0, num_steps=math.ceil(num_prompts / cfg.data.prompts_per_step))
