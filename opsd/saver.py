"""Writes a run's checkpoints: at once, or while the next steps run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opsd.checkpoints import LEARNER
from opsd.config.run import CheckpointConfig
from opsd.errors import DataError, say
from opsd.learner.group import LearnerGroup
from opsd.run_folder import RunFolder
from opsd.stopping import what_is_left


class Saver:
    """One checkpoint at a time. A full disk costs that checkpoint and not the run: a line says so."""

    def __init__(self, *, folder: RunFolder, learner: LearnerGroup, cfg: CheckpointConfig) -> None:
        self.folder, self.learner, self.cfg = folder, learner, cfg
        self.newest_step: int | None = None  # that was begun, and has not failed
        self._pending: tuple[Path, dict[str, Any]] | None = None  # where it is written, and the driver's state then

    def begin(self, step: int, state: dict[str, Any]) -> None:
        """Save the learner as it is after `step` steps; checkpoint.in_background: `finish` gives it its name."""
        self.finish(wait=True)  # an earlier one
        self.newest_step = step
        unfinished = self.folder.checkpoints.unfinished(step)
        try:
            self.folder.checkpoints.begin(step)
            self.learner.save(unfinished / LEARNER, in_background=self.cfg.in_background)
        except (OSError, DataError) as error:
            self._failed(unfinished, error)
        else:
            self._pending = unfinished, state
            self.finish(wait=not self.cfg.in_background)

    def finish(self, *, wait: bool) -> None:
        """Give the checkpoint that is being written its name, where it is written. `wait`: until it is."""
        if self._pending is None:
            return
        unfinished, state = self._pending
        try:
            sums = self.learner.saved(wait=wait)
            if sums is None:
                return
            self._pending = None
            self.folder.checkpoints.finish(unfinished, state, sums, keep=self.cfg.keep, keep_best=self.cfg.keep_best)
        except (OSError, DataError) as error:
            self._pending = None
            self._failed(unfinished, error)

    def _failed(self, unfinished: Path, error: Exception) -> None:
        self.newest_step = None
        self.folder.checkpoints.drop(unfinished)
        say(
            f"warning {unfinished.name.removeprefix('unfinished_')} was not saved: {error}; {what_is_left(self.folder)}"
        )
