"""What a run reads of the user's: where it lies, and what is in it, so that a resumed run reads the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from opsd.config.run import RunConfig
from opsd.errors import ConfigError
from opsd.teacher.sources import section_of, teachers_by_source

SAMPLE = 1 << 16  # bytes at the head and the tail of a file of weights: reading 140 GB would take minutes


def input_paths(cfg: RunConfig) -> dict[str, Path]:
    """Files and folders that the run reads, by the setting that names them."""
    named = {
        "student.path": cfg.student.path,
        "data.train_path": cfg.data.train_path,
        "data.eval_path": cfg.data.eval_path,
    }
    for source, teacher in teachers_by_source(cfg.teacher).items():
        named[f"{section_of(source)}.path"] = teacher.path
    return {name: Path(path) for name, path in named.items() if path and Path(path).exists()}


def require_outside(folder: Path, cfg: RunConfig) -> None:
    """Raises ConfigError where the run would read what lies in the folder that it writes, and may delete."""
    own = folder.resolve()
    for name, path in input_paths(cfg).items():
        if path.resolve() == own or own in path.resolve().parents:
            raise ConfigError(
                f"{name}={path} lies in output_dir={folder}, which the run writes and overwrite=true deletes: choose "
                "another output_dir, or copy it elsewhere first"
            )


def fingerprints(cfg: RunConfig) -> dict[str, str]:
    """A sum over the contents of each input: whole files of data, and of a model whatever is small beside its weights,
    whose sizes, heads and tails stand for them."""
    return {name: fingerprint(path) for name, path in input_paths(cfg).items()}


def fingerprint(path: Path) -> str:
    """Of a file, or of a folder's own files (those in folders below it are no part of a model)."""
    total = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file() and not file.name.startswith("."):
            total.update(f"{file.name if path.is_dir() else ''} {file.stat().st_size}\n".encode())
            _add(total, file, whole=path.is_file() or file.stat().st_size <= 2 * SAMPLE)
    return total.hexdigest()


def _add(total: hashlib._Hash, file: Path, *, whole: bool) -> None:
    with file.open("rb") as opened:
        if whole:
            while block := opened.read(1 << 20):
                total.update(block)
        else:
            total.update(opened.read(SAMPLE))
            opened.seek(-SAMPLE, 2)
            total.update(opened.read())
