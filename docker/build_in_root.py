"""Does what a Dockerfile says in a clean Debian made by debootstrap: python build_in_root.py DOCKERFILE ROOT [SEEN...].

For docker/check.sh, as root and in a mount namespace of its own. The base image is replaced by Debian with Debian's own
Python; apt and pip in it are set up as on this machine, or they would find nothing behind a mirror or a proxy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from dockerfile import instructions

BUILD_CONTEXT = Path(__file__).resolve().parents[1]
DEBIAN = "bookworm"
IN_PLACE_OF_THE_BASE_IMAGE = ("ca-certificates", "python3", "python3-venv")
NETWORK_FILES = ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs/ca-certificates.crt")
NETWORK_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
SMOKE_TEST = (
    ".venv/bin/python -c 'import opsd.train, tip.train, vllm; print(vllm.__version__)'"
    " && .venv/bin/python -m tip.train --cfg job >/dev/null"
    " && bash recipes/quickstart.sh num_steps=3 eval.num_problems=20 log.wandb=off"
    " && test -s outputs/quickstart/report.html"
)


def main(dockerfile: Path, root: Path, seen: list[str]) -> None:
    packages = ",".join(IN_PLACE_OF_THE_BASE_IMAGE)
    say(f"debootstrap {DEBIAN} {root}")
    run(["debootstrap", "--variant=minbase", f"--include={packages}", DEBIAN, str(root)], stdout=subprocess.DEVNULL)
    connect(root, seen)
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    environment |= {name: value for name, value in os.environ.items() if is_for_the_network(name)}
    folder = "/"
    for step in instructions(dockerfile):
        say(f"{step.name} {step.value}")
        match step.name:
            case "FROM" | "CMD":
                pass
            case "WORKDIR":
                folder = step.words[0]
                (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
            case "ENV":
                environment |= dict(word.split("=", 1) for word in step.words)
            case "ARG":
                environment.setdefault(*step.words[0].split("=", 1))
            case "COPY":
                copy(step.words, root / folder.lstrip("/"))
            case "RUN":
                inside(root, folder, environment, step.value)
            case _:
                sys.exit(f"{dockerfile}, line {step.line}: {step.name} is not a step that this check can do")
    say("a short run of what the image starts")
    inside(root, folder, environment, SMOKE_TEST)


def is_for_the_network(name: str) -> bool:
    return name in NETWORK_VARIABLES or name.startswith("PIP_") or name == "OPSD_TORCH_INDEX"


def connect(root: Path, seen: list[str]) -> None:
    """The kernel's file systems, this machine's way to the package indexes, and the folders `seen`, where they are."""
    for name in ("proc", "sys", "dev"):
        run(["mount", "--rbind", f"/{name}", str(root / name)])
    for name in filter(os.path.exists, NETWORK_FILES):
        shutil.copy(name, root / name.lstrip("/"))
    for folder in seen:
        (root / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        run(["mount", "--bind", folder, str(root / folder.lstrip("/"))])


def copy(words: list[str], folder: Path) -> None:
    """COPY . . : the build context without what .dockerignore names."""
    if words != [".", "."]:
        sys.exit(f"COPY {' '.join(words)}: this check knows only COPY . .")
    left_out = [f"--exclude={pattern.removeprefix('**/')}" for pattern in Path(".dockerignore").read_text().split()]
    archive = subprocess.Popen(["tar", "-c", *left_out, "-C", str(BUILD_CONTEXT), "."], stdout=subprocess.PIPE)
    run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout)
    if archive.wait():
        sys.exit("tar could not read the build context")


def inside(root: Path, folder: str, environment: dict[str, str], command: str) -> None:
    run(["chroot", str(root), "/bin/sh", "-c", f"cd {folder} && {command}"], env=environment)


def run(command: list[str], **options: object) -> None:
    code = subprocess.run(command, check=False, **options).returncode
    if code:
        sys.exit(f"failed with exit code {code}: {' '.join(command)}")


def say(line: str) -> None:
    print(f"== {line}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]).resolve(), sys.argv[3:])
