"""Files that are whole or not there: what a kill or a full disk leaves is the file as it was."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TypedDict


class FileSum(TypedDict):
    """What a file must be like to be the one that was written."""

    bytes: int
    sha256: str


def write_whole(path: Path, text: str) -> None:
    """Write beside it, force it to the disk, rename. Raises OSError with `path` as it was."""
    beside = path.with_name(f"{path.name}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Force what another library has written to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def file_sum(path: Path) -> FileSum:
    """Raises OSError."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def unlike(path: Path, wanted: FileSum, *, contents: bool = True) -> str | None:
    """In a few words how a file differs from what was written; None: it does not.

    `contents`: also compare these, not the size alone.
    """
    try:
        size = path.stat().st_size
        if size != wanted["bytes"]:
            return f"{path.name} has {size:,} bytes, {wanted['bytes']:,} were written"
        if contents and file_sum(path) != wanted:
            return f"{path.name} has other contents than were written"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror or error})"
    return None
