"""Files and folders that settings name, looked at before anything is loaded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from opsd.errors import ConfigError

LONGEST_BELOW = 200  # bytes of the longest path that a run makes below its folder


def require_writable(setting: str, path: str | Path) -> None:
    """Raises ConfigError where no folder can be made, or written to, at `path`. Leaves nothing there.

    It is tried with an empty folder in the nearest one that there is, since whether a file system takes one is not to
    be read off its permissions (a full quota, /proc, root on a read-only disk).
    """
    whole = Path(path).absolute()
    try:
        here = next(part for part in (whole, *whole.parents) if os.path.lexists(part))
        if here.exists() and not here.is_dir():
            below = "" if here == whole else f" lies below {here}, which"
            raise ConfigError(f"{setting}={path}{below} is a file")
        too_long = any(len(os.fsencode(name)) > os.pathconf(here, "PC_NAME_MAX") for name in whole.parts)
        if too_long or len(os.fsencode(whole)) + LONGEST_BELOW > os.pathconf(here, "PC_PATH_MAX"):
            raise ConfigError(f"{setting}={path} is too long for a file's name")
        os.rmdir(tempfile.mkdtemp(prefix=".opsd-", dir=here))
    except OSError as error:
        raise ConfigError(f"{setting}={path}: nothing can be written there: {error.strerror}") from error


def require_ray_token() -> None:
    """Raises ConfigError where Ray, started on this node, could not write the token of its cluster into the home."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled" or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    folder = Path(os.path.expanduser("~")) / ".ray"
    if os.path.isfile(folder / "auth_token"):
        return
    try:
        require_writable("HOME", folder)
    except ConfigError as error:
        raise ConfigError(
            f"{error}: Ray keeps its token there; set HOME to a folder that can be written to, or give RAY_AUTH_TOKEN"
        ) from error
