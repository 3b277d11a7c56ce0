"""What the container files refer to is there and pinned. Prints one line a fault; exit code 1 where there is one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from dockerfile import Instruction, instructions

ROOT = Path(__file__).resolve().parents[1]
PINNED_IMAGE = re.compile(r"[\w./-]+:(?!latest$)[\w.-]*\d[\w.-]*")
PINNED_PACKAGE = re.compile(r"[\w.-]+(\[[\w,-]+\])?==[\w.+!-]+( *;.*)?")
SCRIPT = re.compile(r"[\w./-]+\.(?:sh|py)$")
SERVICE_FIELDS = {
    "image", "build", "profiles", "command", "environment", "volumes", "network_mode", "ipc", "init", "restart",
    "depends_on", "deploy",
}  # fmt: skip


def main() -> int:
    ignored = (ROOT / ".dockerignore").read_text().split()
    faults = list(compose_faults(ROOT / "docker" / "compose.yaml"))
    for path in sorted((ROOT / "docker").glob("Dockerfile*")):
        for step in instructions(path):
            faults += (f"{path.name}, line {step.line}: {fault}" for fault in step_faults(step, ignored))
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        faults += requirement_faults(path)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def step_faults(step: Instruction, ignored: list[str]) -> Iterator[str]:
    if step.name == "FROM" and not PINNED_IMAGE.fullmatch(step.words[0]):
        yield f"image {step.words[0]} has no fixed tag"
    if step.name in ("COPY", "ADD"):
        for source in (word for word in step.words[:-1] if not word.startswith("--")):
            if source != "." and not any(ROOT.glob(source)):
                yield f"copies {source}, which does not exist"
            if source.split("/")[0] in ignored:
                yield f"copies {source}, which .dockerignore leaves out"
    if step.name in ("RUN", "CMD", "ENTRYPOINT"):
        for word in filter(SCRIPT.match, step.words):
            if not (ROOT / word).is_file():
                yield f"runs {word}, which does not exist"


def compose_faults(path: Path) -> Iterator[str]:
    compose = yaml.safe_load(path.read_text())
    services, named = compose["services"], compose.get("volumes") or {}
    for name, service in services.items():
        for fault in (*service_faults(service, services, path.parent), *mount_faults(service, named, path.parent)):
            yield f"{path.name}: {name} {fault}"


def service_faults(service: dict, services: dict, folder: Path) -> Iterator[str]:
    for field in sorted(set(service) - SERVICE_FIELDS):
        yield f"has a field {field} that this check does not know"
    for other in service.get("depends_on", ()):
        if other not in services:
            yield f"depends on {other}, which is no service"
    if build := service.get("build"):
        if not (folder / build["context"] / build["dockerfile"]).is_file():
            yield f"is built from {build['dockerfile']}, which does not exist"
    elif not PINNED_IMAGE.fullmatch(service.get("image", "")):
        yield f"has image {service.get('image')}, which has no fixed tag"


def mount_faults(service: dict, named: dict, folder: Path) -> Iterator[str]:
    """A writable folder need not exist: the engine makes it."""
    for volume in service.get("volumes", ()):
        source, _, target = volume.partition(":")
        if source.startswith(".") and target.endswith(":ro") and not (folder / source).exists():
            yield f"mounts {source}, which does not exist"
        if source[0] not in "./" and source not in named:
            yield f"mounts the volume {source}, which is not declared"
        if not target.startswith("/"):
            yield f"mounts {source} at {target!r}, which is no absolute path"


def requirement_faults(path: Path) -> Iterator[str]:
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        requirement = line.split(" #")[0].strip()
        if requirement and not requirement.startswith("#") and not PINNED_PACKAGE.fullmatch(requirement):
            yield f"{path.name}, line {number}: {requirement} is not pinned"


if __name__ == "__main__":
    sys.exit(main())
