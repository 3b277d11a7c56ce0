"""The folder of a run: who may write to it, what is in it, and its checkpoints."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from opsd.config.run import RunConfig
from opsd.errors import ConfigError, DataError

# Of an EngineConfig: how many engines there are, and what each has to work with.
ENGINE_SEATS = (
    "num_workers", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib", "max_num_seqs", "cpu_threads",
    "batch_invariant",
)  # fmt: skip
# What a resumed run may change, by the reason; another difference would make it another run. A name stands for all
# that is below it. num_steps may grow, too.
BOOKKEEPING = "what is written, measured and kept"
FREE_ON_RESUME = {
    BOOKKEEPING: ("output_dir", "resume", "overwrite", "stop_at_step", "eval", "checkpoint", "log"),
    # Sums are taken in another order, so the last bits may differ, and with them a token that is sampled.
    "where the work is done, and how much of it at once": (
        "placement",
        "learner.num_workers", "learner.micro_batch_tokens", "learner.activation_checkpointing",
        "learner.cpu_offload", "learner.compile", "learner.cpu_threads",
        *(f"rollout.{name}" for name in (*ENGINE_SEATS, "group_size", "weight_transfer")),
        *(f"teacher.{name}" for name in (*ENGINE_SEATS, "max_batch_tokens")),
    ),
    "servers move from job to job": ("teacher.urls", "teacher.http"),
}  # fmt: skip
CHECKPOINT_NAME = re.compile(r"step_(\d{6,})")


class RunFolder:
    """output_dir: config.yaml, metrics.jsonl, tokens.jsonl, checkpoints/step_NNNNNN, student/, summary.json, report."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student"

    def claim(self, cfg: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Make the folder this run's. Raises ConfigError rather than touch another run's files unasked.

        Returns the settings with which a run continues otherwise than it began: by dotted name, before and now.
        """
        changed = {}
        config_file = self.path / "config.yaml"
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={self.path} is a file")
        if config_file.is_file():
            if cfg.overwrite:
                shutil.rmtree(self.path)
            elif cfg.resume == "never":
                raise ConfigError(
                    f"output_dir={self.path} holds another run: choose another folder, or set resume=auto to continue "
                    "with it, or overwrite=true to delete it"
                )
            else:
                changed = self._changes(yaml.safe_load(config_file.read_text()), cfg)
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(f"output_dir={self.path} holds files that are not a run's: choose an empty or new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        config_file.write_text(yaml.safe_dump(asdict(cfg), sort_keys=False))
        return changed

    def newest_checkpoint(self) -> Path | None:
        """The newest finished checkpoint; an interrupted one has another name."""
        found = self._finished() if self.checkpoints.is_dir() else []
        return found[-1] if found else None

    def newest_step(self) -> int | None:
        """How many steps the newest finished checkpoint has seen; None where there is none."""
        newest = self.newest_checkpoint()
        named = newest and CHECKPOINT_NAME.fullmatch(newest.name)
        return int(named[1]) if named else None

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

    def remove_summary(self) -> None:
        """The figures of an earlier end are not those of a run that continues."""
        (self.path / "summary.json").unlink(missing_ok=True)

    def _finished(self) -> list[Path]:
        """Finished checkpoints by step."""
        return sorted(p for p in self.checkpoints.iterdir() if CHECKPOINT_NAME.fullmatch(p.name))

    def _changes(self, earlier: dict[str, Any], cfg: RunConfig) -> dict[str, tuple[Any, Any]]:
        """By dotted name, before and now. Raises ConfigError for a setting that makes it another run."""
        before, now = flat(earlier), flat(_as_yaml(asdict(cfg)))
        pairs: dict[str, tuple[Any, Any]] = {name: (before.get(name), now.get(name)) for name in {**before, **now}}
        changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        for name, (old, new) in changed.items():
            longer = name == "num_steps" and new > old
            if not longer and not any(_is_below(name, free) for free in FREE_ON_RESUME.values()):
                shorter = "; for fewer steps set stop_at_step" if name == "num_steps" else ""
                raise ConfigError(
                    f"resume=auto: {name} differs from the run in {self.path}: it had {old}, this one has {new}"
                    + shorter
                )
        return {name: pair for name, pair in changed.items() if not _is_below(name, FREE_ON_RESUME[BOOKKEEPING])}


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The driver's state of a checkpoint. Raises DataError where it cannot be read."""
    try:
        return json.loads((checkpoint / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{checkpoint}/state.json: cannot read it: {error}") from error


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, as they are given on the command line. An empty mapping is a value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def _is_below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _as_yaml(value: Any) -> Any:
    """`value` as it reads back from a YAML file (tuples become lists, and so on)."""
    return yaml.safe_load(yaml.safe_dump(value))
