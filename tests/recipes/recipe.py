"""Starting a recipe as a user does, with the interpreter that runs the tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAPERS = ["qwen3_8b_to_4b.sh", "llama3_70b_to_8b.sh", "qwen2_5_14b_to_1_5b.sh"]
DISTILLING = [*PAPERS, "todi.sh", "adakd.sh", "kdrl.sh", "opsd_self_distill.sh"]  # on DATA_DIR


def start(recipe, *settings, cwd=ROOT, timeout=300, **variables):
    """The finished process. Nothing of this machine's own settings reaches it but the path and the interpreter."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", ""),
        "PYTHONPATH": str(ROOT),
        "OPSD_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **{name: str(value) for name, value in variables.items()},
    }
    command = ["bash", str(ROOT / "recipes" / recipe), *settings]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
