"""The instructions of a Dockerfile that hadolint has accepted, for the two checks beside this file."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    line: int  # where it begins, from 1
    name: str  # RUN, COPY, ...
    value: str  # the rest, its continuation lines joined by spaces

    @property
    def words(self) -> list[str]:
        """The arguments, of either form: COPY a b, or COPY ["a", "b"]."""
        return json.loads(self.value) if self.value.startswith("[") else shlex.split(self.value)


def instructions(path: Path) -> list[Instruction]:
    """In order. Heredocs and the escape directive are unknown to it; our files have neither."""
    found, begun, parts = [], 0, []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.strip()
        if text.startswith("#") or not (text or parts):
            continue
        begun = begun if parts else number
        parts.append(text.removesuffix("\\").strip())
        if not text.endswith("\\"):
            name, _, value = " ".join(parts).partition(" ")
            found.append(Instruction(line=begun, name=name.upper(), value=value.strip()))
            parts = []
    return found
