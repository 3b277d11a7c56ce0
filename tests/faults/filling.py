"""Hooks of a run whose disk is full from its third step to its fifth, or from its third to its end."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import tip.plugin

FULL_FROM, FULL_UNTIL = 2, 4  # steps, from 0


def build_hooks(cfg: Any) -> Any:
    hooks, filler = tip.plugin.build_hooks(cfg), Path(cfg.output_dir).parent / "filler"

    def select(batch: Any) -> Any:
        if batch.step == FULL_FROM and batch.num_steps == cfg.num_steps:
            fill(filler)
        if batch.step == FULL_UNTIL and not cfg.hook_options["to_the_end"]:
            filler.unlink(missing_ok=True)
        return hooks.select(batch)

    return dataclasses.replace(hooks, select=select)


def fill(path: Path) -> None:
    """All that the file system has left, and then what a block leaves."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(os.urandom(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
