"""Every command that a page shows runs as it is printed, as far as a machine without models and GPUs can show it.

Recipes and programs are given `--cfg job`: they read every setting, refuse one that does not exist, and start nothing.
A recipe with PLAN_ONLY=1 runs as it stands. Of other scripts the file must be there and every option in its `--help`.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/guide.md", "CONTRIBUTING.md", "recipes/cluster.md")
# Other people's programs, the shell's own words, and a line with "..." for what the reader has.
NOT_OURS = {"source", "export", "ray", "vllm", "docker", "prometheus"}
ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=")


def shown(page):
    """The commands in a page's bash blocks, one string each, without comments."""
    for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s+# .*$", "", line).strip()
            words = shlex.split(command)
            if words and words[0] not in NOT_OURS and "..." not in words:
                yield command


COMMANDS = sorted({command for page in PAGES for command in shown(page)})


def start(words, **variables):
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": os.environ.get("HOME", ""),
        "PYTHONPATH": str(ROOT),
        "OPSD_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def split(command):
    """Its variables and its words."""
    words = shlex.split(command)
    variables = {}
    while ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return variables, words


def test_the_pages_show_commands():
    assert len(COMMANDS) > 20
    assert {"bash recipes/quickstart.sh", "bash scripts/test.sh"} <= set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_printed(command, tmp_path):
    variables, words = split(command)
    program = next(word for word in words if word not in ("bash", "python", "-m"))
    if words[:2] == ["python", "-m"]:
        finished = start([*words, "--cfg", "job"], **variables)
        assert finished.returncode == 0, finished.stderr
    elif program.startswith("recipes/"):
        if "PLAN_ONLY" not in variables:
            words.append("--cfg")
            words.append("job")
        folders = {name: str(made(tmp_path / name)) for name in variables if name.endswith(("_PATH", "_DIR"))}
        finished = start(words, **(variables | folders))
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.strip()
    elif program.endswith(".py"):
        finished = start([sys.executable, program, "--help"])
        assert finished.returncode == 0, finished.stderr
        missing = [word for word in words if word.startswith("--") and word not in finished.stdout]
        assert not missing
    else:
        assert (ROOT / program).is_file(), f"{program} is not there"
        assert start(["bash", "-n", program]).returncode == 0


def made(folder):
    """A folder as a recipe expects one: with a model's configuration and data."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("train.jsonl", "test.jsonl", "val_one.jsonl"):
        (folder / name).write_text("")
    return folder


def test_the_loop_in_the_readme_is_the_loop():
    [pasted] = re.findall(r"```python\n(def loop\(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert pasted.strip() in (ROOT / "opsd" / "train.py").read_text()
