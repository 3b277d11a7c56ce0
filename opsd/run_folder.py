"""The folder of a run: who may write to it, what is in it, and its checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from opsd.config import RunConfig
from opsd.errors import ConfigError, DataError

# A resumed run may change these; any other difference would make it another run.
FREE_ON_RESUME = ("output_dir", "resume", "overwrite", "stop_at_step", "eval", "checkpoint", "log")
FREE_WITHIN = {"teacher": ("urls", "http")}  # servers move from job to job
CHECKPOINT_NAME = re.compile(r"step_(\d{6,})")


class RunFolder:
    """output_dir: config.yaml, metrics.jsonl, tokens.jsonl, checkpoints/step_NNNNNN, student/, summary.json, report."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"

    def claim(self, cfg: RunConfig) -> None:
        """Make the folder this run's. Raises ConfigError rather than touch another run's files unasked."""
        config_file = self.path / "config.yaml"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={self.path} is a file")
        if config_file.is_file():
            if cfg.overwrite:
                shutil.rmtree(self.path)
            elif cfg.resume == "never":
                raise ConfigError(
                    f"output_dir={self.path} holds another run: choose another folder, or set resume=auto to go on "
                    "with it, or overwrite=true to delete it"
                )
            else:
                self._check_same_run(yaml.safe_load(config_file.read_text()), cfg)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(f"output_dir={self.path} holds files that are not a run's: choose an empty or new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        config_file.write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))

    def newest_checkpoint(self) -> Path | None:
        """The newest finished checkpoint; an interrupted one has another name."""
        found = self._finished() if self.checkpoints.is_dir() else []
        return found[-1] if found else None

    def begin_checkpoint(self, step: int) -> Path:
        """An empty folder to write to; `finish_checkpoint` gives it its name."""
        unfinished = self.checkpoints / f"unfinished_step_{step:06d}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        return unfinished

    def finish_checkpoint(self, unfinished: Path, state: dict[str, Any], keep: int) -> None:
        """Write the driver's state, give the checkpoint its name in one rename, and drop all but the newest `keep`."""
        (unfinished / "state.json").write_text(json.dumps(state))
        final = unfinished.with_name(unfinished.name.removeprefix("unfinished_"))
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        for old in self._finished()[:-keep]:
            shutil.rmtree(old)

    def write_summary(self, summary: dict[str, Any]) -> None:
        (self.path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")

    def _finished(self) -> list[Path]:
        """Finished checkpoints by step."""
        return sorted(p for p in self.checkpoints.iterdir() if CHECKPOINT_NAME.fullmatch(p.name))

    def _check_same_run(self, earlier: dict[str, Any], cfg: RunConfig) -> None:
        now = asdict(cfg)
        for section in [*earlier, *(name for name in now if name not in earlier)]:
            before, after = (_fixed(section, each.get(section)) for each in (earlier, now))
            if section not in FREE_ON_RESUME and before != after:
                raise ConfigError(
                    f"resume=auto: {section} differs from the run in {self.path}: it had {before}, this one has {after}"
                )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The driver's state of a checkpoint. Raises DataError where it cannot be read."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{checkpoint}/state.json: cannot read it: {error}") from error


def _fixed(section: str, value: Any) -> Any:
    """What a resumed run must have in common with its beginning, as it reads back from a YAML file."""
    if isinstance(value, dict):
        value = {name: setting for name, setting in value.items() if name not in FREE_WITHIN.get(section, ())}
    return _as_yaml(value)


def _as_yaml(value: Any) -> Any:
    """`value` as it reads back from a YAML file (tuples become lists, and so on)."""
    return yaml.safe_load(yaml.safe_dump(value))
