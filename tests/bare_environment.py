"""An interpreter with torch and transformers and nothing else that this repository uses: a bare GPU box, in a second.

The environment is a real one, with its own site-packages folder; the packages in it are links to the installed ones.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

BARE = ("torch", "transformers", "numpy", "safetensors")


def make_bare_environment(folder: Path) -> Path:
    """Returns its interpreter, which sees BARE and what these require, and no other package."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [site_packages] = folder.glob("lib/python*/site-packages")
    for found in with_requirements(BARE):
        for name in {file.parts[0] for file in found.files or () if ".." not in file.parts}:
            if name != "__pycache__" and not (site_packages / name).exists():
                os.symlink(Path(found.locate_file(name)).absolute(), site_packages / name)
    return folder / "bin" / "python"


def with_requirements(names: tuple[str, ...]) -> list[Distribution]:
    """The installed packages of these names, and all that they require without extras."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # a requirement that --no-deps left out, such as a CUDA library beside a CPU build of torch
        required = [Requirement(text) for text in found[name].requires or ()]
        waiting += [r.name for r in required if r.marker is None or r.marker.evaluate({"extra": ""})]
    return list(found.values())
