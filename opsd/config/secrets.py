"""Secrets: where a token is read from, and that none is a setting.

Settings are written into a run's folder, its report and wandb, and any process of the machine reads a command line.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from opsd.errors import ConfigError

MOST_BYTES = 4096  # of a token; a header of a request has room for no more than some of these
TOKEN = re.compile(r"[\x21-\x7e]+")  # what a header can hold
SECRET_NAME = re.compile(
    r"(^|_)(hf_token|auth_token|access_token|bearer_token|^token|api_?key|access_?key|secret|secret_key|private_key"
    r"|password|passwd|credentials?)$",
    re.IGNORECASE,
)

logger = logging.getLogger(__name__)


def read_token(section: str, token_file: str, token_env: str) -> str:
    """The bearer token from the file, else from the environment; empty where there is none.

    Raises ConfigError, which never holds the token, where the file cannot be read or either holds anything else.
    """
    where = f"{section}token_file={token_file}" if token_file else f"${token_env}"
    token = (_text(where, Path(token_file)) if token_file else os.environ.get(token_env, "")).strip()
    if token_file and not token:
        raise ConfigError(f"{where}: the file is empty")
    if token and (len(token) > MOST_BYTES or not TOKEN.fullmatch(token)):
        raise ConfigError(
            f"{where} must hold one token and nothing else: printable ASCII characters without spaces, at most "
            f"{MOST_BYTES}"
        )
    return token


def refuse_secrets(settings: Mapping[str, Any], prefix: str = "") -> None:
    """Raises ConfigError, which does not hold it, for a text at any depth whose name says that it is a secret."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, f"{prefix}{name}.")
        elif isinstance(value, str) and value and SECRET_NAME.search(str(name)):
            raise ConfigError(
                f"{prefix}{name} looks like a secret, and settings are written into the run's folder and to wandb: "
                "give it in the environment, under the name by which the library that wants it looks there"
            )


def _text(where: str, path: Path) -> str:
    """What the file holds, a byte as a character, and no more of it than says that it is too long."""
    try:
        if not path.is_file():
            raise ConfigError(f"{where}: there is no such file")
        with path.open("rb") as file:
            _warn_of_readers(where, os.fstat(file.fileno()).st_mode)
            return file.read(MOST_BYTES + 2).decode("latin-1")  # two: a newline may follow the longest
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read: {error.strerror or error}") from error


@cache  # a run reads its token for every server
def _warn_of_readers(where: str, mode: int) -> None:
    if mode & 0o077:
        logger.warning("%s: others on this machine may read it (mode %03o): chmod 600", where, mode & 0o777)
