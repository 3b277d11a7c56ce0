"""JSONL files whose every line has a "step": written line by line, read back, cut where a run resumes."""

from __future__ import annotations

import itertools
import json
import math
import numbers
import os
import shutil
from pathlib import Path
from typing import Any

from opsd.errors import DataError


def finite_or_null(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become None, NumPy and Torch scalars plain numbers; recursive."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Adds one line to `path`; it is with the operating system when this returns.

    Raises OSError where not all of it could be written (a full disk takes a part), with the file as it was: half a line
    would make the next one unreadable.
    """
    line = (json.dumps(finite_or_null(record), allow_nan=False) + "\n").encode()
    with path.open("ab", buffering=0) as file:
        before, written = file.seek(0, os.SEEK_END), 0
        try:
            while written < len(line):
                written += file.write(line[written:]) or 0
        except OSError:
            file.truncate(before)
            raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects in `path`, one a line. An unfinished last line, as a killed run leaves it, is passed over.

    Raises DataError where the file is missing or another line is no JSON object with a "step".
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is unfinished or empty
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: expected JSON, got {line[:60]!r} ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise DataError(f"{path}, line {number}: expected an object with an integer step, got {line[:60]!r}")
        records.append(record)
    return records


def truncate_jsonl(path: Path, step: int) -> Path | None:
    """Drops the lines of `path` whose step is after `step`, and an unfinished last line. No file: nothing to do.

    Where whole lines go, the file as it was stays beside it under another name, which is returned.
    """
    if not path.exists():
        return None
    records = read_jsonl(path)
    kept = [record for record in records if record["step"] <= step]
    copy = _free_name(path) if len(kept) < len(records) else None
    if copy is not None:
        shutil.copyfile(path, copy)
    rewritten = path.with_name(path.name + ".tmp")
    rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(rewritten, path)
    return copy


def _free_name(path: Path) -> Path:
    """metrics.replaced_1.jsonl, or the next number for which there is no file yet."""
    names = (path.with_name(f"{path.stem}.replaced_{number}{path.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
