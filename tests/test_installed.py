"""What `pip install .` puts into an environment: every file that the packages read, and commands that start."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {"opsd-train", "opsd-plan", "tip-train", "tip-plan", "opsd-evaluate", "opsd-export", "opsd-prepare"}
COMMANDS |= {"opsd-compare"}
# Every command's function, the settings that Hydra composes and the report's page, from the wheel alone.
USE = """
import sys
from importlib.metadata import distribution
from importlib.resources import files
import opsd, opsd.report.page, tip
assert opsd.__path__[0].startswith(sys.argv[1]) and tip.__path__[0].startswith(sys.argv[1])
for command in distribution("opsd-tip").entry_points:
    assert callable(command.load()), command
for module, name in (("opsd.conf", "run"), ("opsd.conf", "evaluate"), ("tip.conf", "tip")):
    assert (files(module) / f"{name}.yaml").is_file()
sys.argv = ["tip-train", "--cfg", "job", "selector=entropy", "student.path=mine"]
tip.train.main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns(".*", "outputs", "build", "wandb", "*.egg-info", "__pycache__", "tests", "recipes")
    shutil.copytree(ROOT, folder / "source", ignore=skipped)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, folder], cwd=folder / "source", check=True, capture_output=True)
    [file] = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def metadata(wheel, name):
    [path] = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_every_file_of_the_packages_is_in_the_wheel(wheel):
    packaged = {
        str(path.relative_to(ROOT))
        for package in ("opsd", "tip")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".md")
    }
    assert {Path(name).suffix for name in packaged} >= {".py", ".yaml", ".css", ".js"}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == packaged


def test_it_describes_itself_and_names_its_commands(wheel):
    fields = Parser().parsestr(metadata(wheel, "METADATA"))
    assert fields["Description-Content-Type"] == "text/markdown"
    assert fields.get_payload().startswith((ROOT / "README.md").read_text()[:200])
    assert all("arxiv.org/abs/2604.14084" in link for link in fields.get_all("Project-URL"))
    listed = metadata(wheel, "entry_points.txt").splitlines()
    assert {line.split(" = ")[0] for line in listed if " = " in line} == COMMANDS


@pytest.mark.slow
def test_the_commands_load_from_the_wheel_alone_in_any_folder(wheel, tmp_path):
    wheel.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-P", "-c", USE, str(tmp_path / "site")]
    process = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    assert "  score: entropy" in process.stdout.splitlines() and "  path: mine" in process.stdout.splitlines()
