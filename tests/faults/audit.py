"""Which files and folders this process changes outside of one folder, as Python's audit events tell."""

import os
import sys
from contextlib import contextmanager

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
ALLOWED = ("__pycache__", "/dev/null", ".hypothesis")  # modules imported for the first time; the generator's own

_watched: dict[str, list[str]] = {}  # folder -> what was changed elsewhere; an audit hook cannot be taken away again


@contextmanager
def changes_outside(folder):
    """A list that grows with every path outside `folder` that is written, made, moved or deleted."""
    if not _watched.get("installed"):
        sys.addaudithook(_hear)
        _watched["installed"] = ["yes"]
    found = _watched.setdefault(str(folder), [])
    try:
        yield found
    finally:
        del _watched[str(folder)]


def _hear(event, arguments):
    if len(_watched) < 2 or not (event in CHANGES or (event == "open" and arguments[2] & WRITES)):
        return
    path = arguments[0]
    if not isinstance(path, (str, bytes, os.PathLike)):
        return  # a descriptor that is open already
    path = os.path.abspath(os.fsdecode(path))
    for folder, found in _watched.items():
        if not path.startswith(folder) and not any(each in path for each in ALLOWED):
            found.append(f"{event} {path}")
