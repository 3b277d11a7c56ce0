"""The raw results of an ablation: a JSON line for each run, appended as runs finish, and read again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opsd.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("task", "arm", "seed", "settings", "commit", "evaluations")
Record = dict[str, Any]


def raw_file(folder: Path, task: str) -> Path:
    return folder / "raw" / f"{task}.jsonl"


def append(folder: Path, record: Record) -> None:
    """One line, whole or, where the disk is full, told of: the run is then made again."""
    path = raw_file(folder, record["task"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(folder: Path) -> list[Record]:
    """Every run of every task, in the order of files and lines. Raises DataError for a line that is none, or twice."""
    records, seen = [], set()
    for path in sorted((folder / "raw").glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: expected a run as JSON, got {line[:40]!r} ({error})") from error
            missing = [name for name in FIELDS if not isinstance(record, dict) or name not in record]
            if missing:
                raise DataError(f"{where}: expected a run with {', '.join(FIELDS)}; {', '.join(missing)} is missing")
            key = record["task"], record["arm"], record["seed"]
            if key in seen:
                raise DataError(f"{where}: {key[1]} with seed {key[2]} of {key[0]} is there a second time")
            seen.add(key)
            records.append(record)
    return records


def missing_runs(wanted: Iterable[Record], found: Iterable[Record], folder: Path) -> list[Record]:
    """Those of `wanted` (task, arm, seed, settings) that are not there.

    Raises DataError for one that is there with other settings: the two are not comparable.
    """
    known = {(record["task"], record["arm"], record["seed"]): record for record in found}
    missing = []
    for each in wanted:
        record = known.get((each["task"], each["arm"], each["seed"]))
        if record is None:
            missing.append(each)
        elif record["settings"] != each["settings"]:
            raise DataError(
                f"{raw_file(folder, each['task'])}: {each['arm']} with seed {each['seed']} ran with "
                f"{' '.join(record['settings'])}, and now it would with {' '.join(each['settings'])}: "
                "choose another folder"
            )
    return missing


def commit() -> str:
    """Of this checkout, with -changed where files differ from it; unknown: it is none."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        state = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-changed" if state.stdout.strip() else "")
