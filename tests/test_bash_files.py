"""Every bash file of the repository passes shellcheck."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {".git", ".venv", "outputs", "build", "wandb"}


def bash_files():
    """Files that end in .sh, .bash or .sbatch, or whose first line names a shell."""
    found = []
    for path in ROOT.rglob("*"):
        if NOT_OURS.isdisjoint(path.relative_to(ROOT).parts) and path.is_file():
            with path.open("rb") as file:
                first = file.readline()
            if path.suffix in (".sh", ".bash", ".sbatch") or (
                first.startswith(b"#!") and b"sh" in first.split(b"/")[-1]
            ):
                found.append(path)
    return sorted(found)


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck is missing: scripts/setup.sh installs it"
    files = bash_files()
    assert {ROOT / "scripts" / "setup.sh", ROOT / ".ci" / "run", ROOT / "recipes" / "quickstart.sh"} <= set(files)
    process = subprocess.run([shellcheck, *files], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
