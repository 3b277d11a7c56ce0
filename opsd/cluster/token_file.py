"""Ray's token, by which a node of ours knows who may run code on it: a file that its owner alone may read.

Ray makes the file where there is none, with whatever rights the umask leaves to others.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from opsd.errors import ConfigError

OWNER_ONLY = 0o600
OTHERS = stat.S_IRWXG | stat.S_IRWXO
ELSEWHERE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # Ray's names for a token that the user keeps


def private_token_file() -> None:
    """Makes the token in the user's home where there is none yet, and hides one that others may read.

    Does nothing where the user keeps the token elsewhere or has switched it off. Raises ConfigError where the file
    cannot be made so.
    """
    if any(os.environ.get(name) for name in ELSEWHERE) or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        if not path.exists():
            _make(path)
        elif path.stat().st_mode & OTHERS:
            path.chmod(OWNER_ONLY)
    except OSError as error:
        raise ConfigError(
            f"{path} holds ray's token and must be a file that you alone may read: {error.strerror}; "
            "RAY_AUTH_TOKEN_PATH names another"
        ) from error


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
    except FileExistsError:  # another run, in this moment
        return
    with os.fdopen(file, "w") as opened:
        opened.write(secrets.token_hex(32))  # as Ray's own
