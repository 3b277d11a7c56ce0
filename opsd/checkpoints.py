"""The checkpoints of a run: begun under another name, named when they are whole, checked before they are used."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from opsd.errors import DataError
from opsd.files import FileSum, file_sum, sync_folder, unlike, write_whole

NAME = re.compile(r"step_(\d{6,})")
STATE, MANIFEST, LEARNER = "state.json", "manifest.json", "learner"
# Of a folder that is no checkpoint: one that is being written, one that is being deleted, one that is damaged.
UNFINISHED, REMOVED, DAMAGED = "unfinished_", "removed_", "damaged_"


class Checkpoints:
    """A folder of step_NNNNNN, each with state.json, learner/rank_N.safetensors and a manifest of sizes and sums."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def finished(self) -> list[Path]:
        """By step; whether their files are as they were written is not looked at."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        return sorted((each for each in found if NAME.fullmatch(each.name)), key=step_of)

    def newest(self) -> Path | None:
        return next(reversed(self.finished()), None)

    def unfinished(self, step: int) -> Path:
        return self.path / f"{UNFINISHED}step_{step:06d}"

    def begin(self, step: int) -> Path:
        """An empty folder to write to; `finish` gives it its name. Raises OSError."""
        unfinished = self.unfinished(step)
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / LEARNER).mkdir(parents=True)
        return unfinished

    def finish(
        self,
        unfinished: Path,
        state: dict[str, Any],
        learner_sums: dict[str, FileSum],
        *,
        keep: int,
        keep_best: bool = False,
    ) -> Path:
        """Write the driver's state and the manifest, give the checkpoint its name, and drop all but the newest `keep`.

        `learner_sums`: of the ranks' files, by name. `keep_best`: the one with the highest state["score"] stays, too.
        Raises OSError.
        """
        write_whole(unfinished / STATE, json.dumps(state))
        sums = {STATE: file_sum(unfinished / STATE)}
        sums |= {f"{LEARNER}/{name}": each for name, each in learner_sums.items()}
        write_whole(unfinished / MANIFEST, json.dumps({"files": sums}, indent=1))
        sync_folder(unfinished / LEARNER)
        final = unfinished.with_name(unfinished.name.removeprefix(UNFINISHED))
        self._remove(final)
        unfinished.rename(final)
        sync_folder(self.path)
        self._prune(keep, keep_best)
        return final

    def drop(self, unfinished: Path) -> None:
        """What a checkpoint that could not be written takes of the disk is free again."""
        shutil.rmtree(unfinished, ignore_errors=True)

    def clean(self) -> None:
        """Delete what an earlier attempt has left half-written or half-deleted."""
        for each in list(self.path.iterdir()) if self.path.is_dir() else ():
            if each.name.startswith((UNFINISHED, REMOVED)):
                shutil.rmtree(each, ignore_errors=True)

    def set_aside(self, damaged: Path) -> Path:
        """Under another name it is not taken for a checkpoint, and not counted as one of those to keep."""
        aside = damaged.with_name(f"{DAMAGED}{damaged.name}")
        shutil.rmtree(aside, ignore_errors=True)
        return damaged.rename(aside)

    def _prune(self, keep: int, keep_best: bool) -> None:
        finished = self.finished()
        best = max((each for each in finished if score_of(each) is not None), key=score_of, default=None)
        for old in finished[:-keep]:
            if not (keep_best and old == best):
                self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Renamed first: what a kill leaves of it must not look whole."""
        if checkpoint.exists():
            shutil.rmtree(checkpoint.rename(checkpoint.with_name(f"{REMOVED}{checkpoint.name}")), ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """How many steps its name says that it has seen."""
    named = NAME.fullmatch(checkpoint.name)
    assert named, f"{checkpoint} is no checkpoint's name"
    return int(named[1])


def score_of(checkpoint: Path) -> Any:
    """What `keep_best` goes by; None where nothing was measured at that step."""
    try:
        return read_state(checkpoint).get("score")
    except DataError:
        return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The driver's state of a checkpoint. Raises DataError where it cannot be read."""
    return _read_object(checkpoint / STATE)


def read_manifest(checkpoint: Path) -> dict[str, FileSum]:
    """Size and sum of each file, by its path below the checkpoint. Raises DataError where it cannot be read."""
    path = checkpoint / MANIFEST
    if not path.exists():
        raise DataError(f"{path} is missing: the checkpoint is damaged, or an earlier version wrote it")
    files: Any = _read_object(path).get("files")
    whole = isinstance(files, dict) and files and all(_is_sum(each) for each in files.values())
    if not whole or STATE not in files or not any(name.startswith(f"{LEARNER}/") for name in files):
        raise DataError(f"{path}: expected the files of a checkpoint with bytes and sha256, got {str(files)[:60]}")
    return files


def learner_sums(checkpoint: Path) -> dict[str, FileSum]:
    """Of the ranks' files, by name. Raises DataError."""
    sums = read_manifest(checkpoint).items()
    return {name.removeprefix(f"{LEARNER}/"): each for name, each in sums if name.startswith(f"{LEARNER}/")}


def require_whole(checkpoint: Path, *, contents: bool) -> None:
    """Raises DataError that names the first file that is not as it was written.

    `contents`: of the learner's files too, which takes the time to read them; state.json is always read.
    """
    for name, wanted in read_manifest(checkpoint).items():
        wrong = unlike(checkpoint / name, wanted, contents=contents or name == STATE)
        if wrong:
            raise DataError(f"{checkpoint}: {wrong}")
    read_state(checkpoint)


def _is_sum(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("bytes"), int) and isinstance(value.get("sha256"), str)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot read it: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {str(value)[:60]}")
    return value
