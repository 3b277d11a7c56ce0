"""The folder of a run: who may write to it, what is in it, and its checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from opsd import run_lock
from opsd.checkpoints import Checkpoints, step_of
from opsd.config.run import RunConfig
from opsd.errors import ConfigError
from opsd.files import write_whole

# Of an EngineConfig: how many engines there are, and what each has to work with.
ENGINE_SEATS = (
    "num_workers", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib", "max_num_seqs", "cpu_threads",
    "batch_invariant",
)  # fmt: skip
# What a resumed run may change, by the reason; another difference would make it another run. A name stands for all
# that is below it. num_steps may grow, too.
BOOKKEEPING = "what is written, measured and kept"
FREE_ON_RESUME = {
    BOOKKEEPING: (
        "output_dir", "resume", "resume_changed", "overwrite", "stop_at_step", "max_restarts", "eval", "checkpoint",
        "log",
    ),
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
CONFIG, SUMMARY, MARKER = "config.yaml", "summary.json", ".opsd-run.json"
REPORT_CHARTS = (
    "accuracy", "kl", "loss", "kept", "quadrants", "agreement", "entropy", "named_mass", "length", "truncated",
    "grad_norm", "staleness", "throughput", "phases", "idle",
)  # fmt: skip
# What runs write into their folder, and all that overwrite=true deletes there; patterns of names.
OWN_FILES = (
    CONFIG, SUMMARY, "*.tmp", "metrics*.jsonl", "tokens*.jsonl", "report.html",
    *(f"{chart}.png" for chart in REPORT_CHARTS),
)  # fmt: skip
OWN_FOLDERS = ("checkpoints", "student", "wandb")


class RunFolder:
    """output_dir: config.yaml, metrics.jsonl, tokens.jsonl, checkpoints/step_NNNNNN, student/, summary.json, report."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / "checkpoints")
        self.student = self.path / "student"

    def require_ours(self, cfg: RunConfig) -> None:
        """Raises ConfigError unless the folder is new, empty, or a run's that `cfg` may go into. Touches nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"output_dir={self.path} is a file")
        found = (
            [each for each in self.path.iterdir() if not _is(each, (f"{run_lock.NAME}*",))]
            if self.path.is_dir()
            else []
        )
        if not found:
            return
        if not any((self.path / name).is_file() for name in (CONFIG, MARKER)):
            raise ConfigError(f"output_dir={self.path} holds files that are not a run's: choose an empty or new folder")
        if not cfg.overwrite and cfg.resume == "never":
            raise ConfigError(
                f"output_dir={self.path} holds another run: choose another folder, or set resume=auto to continue "
                "with it, or overwrite=true to delete it"
            )
        if not (self.path / MARKER).is_file():
            raise ConfigError(
                f"output_dir={self.path} has a {CONFIG} and no {MARKER}, so no run of this version made it: choose "
                "another folder, or delete it yourself"
            )
        links = [each for each in found if cfg.overwrite and each.is_symlink()]
        if links:
            raise ConfigError(
                f"output_dir={self.path}: {links[0].name} is a link to {links[0].resolve()}, which overwrite=true does "
                "not delete: remove the link yourself"
            )

    def claim(self, cfg: RunConfig, inputs: dict[str, str] | None = None) -> dict[str, tuple[Any, Any]]:
        """Make the folder this run's. Raises ConfigError rather than touch another run's files unasked.

        `inputs`: sums over the contents of what the run reads, by the setting that names it.
        Returns the settings with which a run continues otherwise than it began: by dotted name, before and now.
        """
        self.require_ours(cfg)
        inputs, changed = inputs or {}, {}
        self.path.mkdir(parents=True, exist_ok=True)
        if cfg.overwrite:
            self._delete()
        continues = (self.path / CONFIG).is_file()
        if continues:
            self._require_not_rewound(cfg)
            changed = self._changes(yaml.safe_load((self.path / CONFIG).read_text()), cfg, inputs)
            self.checkpoints.clean()
        else:
            marker = {"program": "opsd", "began": datetime.now(UTC).isoformat(timespec="seconds"), "inputs": inputs}
            write_whole(self.path / MARKER, json.dumps(marker, indent=1))
        if changed or not continues:
            write_whole(self.path / CONFIG, yaml.safe_dump(asdict(cfg), sort_keys=False))
        return changed

    def newest_checkpoint(self) -> Path | None:
        """The newest finished checkpoint; an interrupted one has another name."""
        return self.checkpoints.newest()

    def newest_step(self) -> int | None:
        """How many steps the newest finished checkpoint has seen; None where there is none."""
        newest = self.checkpoints.newest()
        return None if newest is None else step_of(newest)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_whole(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def remove_summary(self) -> None:
        """The figures of an earlier end are not those of a run that continues."""
        (self.path / SUMMARY).unlink(missing_ok=True)

    def _delete(self) -> None:
        """An earlier run's own files, the marker last: half of them are a run's yet. What else is there stays."""
        for each in list(self.path.iterdir()):
            if each.is_dir() and each.name in OWN_FOLDERS:
                shutil.rmtree(each)
            elif each.is_file() and _is(each, OWN_FILES):
                each.unlink()
        (self.path / MARKER).unlink(missing_ok=True)

    def _require_not_rewound(self, cfg: RunConfig) -> None:
        """Raises ConfigError where the checkpoint that the run would continue from is beyond its end."""
        newest, last = self.newest_step(), cfg.stop_at_step or cfg.num_steps
        if newest is not None and newest > last:
            setting = "stop_at_step" if cfg.stop_at_step else "num_steps"
            raise ConfigError(
                f"{setting}={last}: the run in {self.path} has a checkpoint after step {newest} already, and "
                f"resume=auto does not go back: set stop_at_step to {newest} or more, or export an earlier checkpoint"
            )

    def _changes(self, earlier: dict[str, Any], cfg: RunConfig, inputs: dict[str, str]) -> dict[str, tuple[Any, Any]]:
        """By dotted name, before and now. Raises ConfigError for what makes it another run, unless `resume_changed`."""
        before, now = flat(earlier), flat(_as_yaml(asdict(cfg)))
        pairs: dict[str, tuple[Any, Any]] = {name: (before.get(name), now.get(name)) for name in {**before, **now}}
        changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        known = self._inputs()
        same = {name for name in inputs if known.get(name) == inputs[name]}
        for name in inputs.keys() & known.keys() - same:
            changed[name] = f"{before.get(name)} as it was", f"{now.get(name)} with other contents"
        for name, (old, new) in changed.items():
            free = cfg.resume_changed or name in same or any(_is_below(name, free) for free in FREE_ON_RESUME.values())
            longer = name == "num_steps" and new > old
            if not longer and not free:
                shorter = "; for fewer steps set stop_at_step" if name == "num_steps" else ""
                raise ConfigError(
                    f"resume=auto: {name} differs from the run in {self.path}: it had {old}, this one has {new}"
                    + shorter
                    + "; resume_changed=true goes on all the same"
                )
        return {name: pair for name, pair in changed.items() if not _is_below(name, FREE_ON_RESUME[BOOKKEEPING])}

    def _inputs(self) -> dict[str, str]:
        """The sums that the run began with. A marker that cannot be read knows none."""
        try:
            return dict(json.loads((self.path / MARKER).read_text())["inputs"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, as they are given on the command line. An empty mapping is a value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def _is(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _is_below(name: str, sections: tuple[str, ...]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)


def _as_yaml(value: Any) -> Any:
    """`value` as it reads back from a YAML file (tuples become lists, and so on)."""
    return yaml.safe_load(yaml.safe_dump(value))
