"""opsd is whole without tip: nothing in it or in its tests names tip, and its own tests pass where tip is gone."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_TIP = "import sys; sys.modules['tip'] = None; "  # None: not importable
IMPORT_ALL = (
    "import importlib, pkgutil, opsd; assert opsd.__path__[0].startswith(sys.argv[1]); "
    "[importlib.import_module(found.name) for found in pkgutil.walk_packages(opsd.__path__, 'opsd.')"
    " if not found.name.endswith('__main__')]"
)


@pytest.fixture
def only_opsd(tmp_path):
    """A tree with opsd, its tests and what they use."""
    for name in ("opsd", "tests/opsd"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "scripts").mkdir()
    for name in (
        "tests/__init__.py",
        "tests/tiny_models.py",
        "tests/oracle.py",
        "scripts/tiny_architectures.py",
        "pyproject.toml",
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(tree, code, *arguments):
    command = [sys.executable, "-c", WITHOUT_TIP + code, *arguments]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


@pytest.mark.slow
def test_every_module_of_opsd_is_imported_where_tip_is_not(only_opsd):
    process = run(only_opsd, IMPORT_ALL, str(only_opsd))
    assert process.returncode == 0, process.stderr[-2000:]


def test_neither_opsd_nor_its_tests_name_a_module_outside_their_tree(only_opsd):
    """Imports inside functions, and modules named in strings, are found, too."""
    strangers = []
    for path in only_opsd.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("tip."):
                modules = [node.value]
            else:
                continue
            strangers += [
                (path.relative_to(only_opsd), module) for module in modules if not is_there(only_opsd, module)
            ]
    assert not strangers


def is_there(tree, module):
    """Whether `module` is in `tree`, or none of this repository's."""
    parts = module.split(".")
    if not (ROOT / parts[0]).is_dir():
        return True
    while parts and not (tree.joinpath(*parts).is_dir() or tree.joinpath(*parts).with_suffix(".py").is_file()):
        if (ROOT.joinpath(*parts)).is_dir() or ROOT.joinpath(*parts).with_suffix(".py").is_file():
            return False
        parts.pop()
    return bool(parts)


@pytest.mark.long
def test_opsd_passes_its_tests_without_tip(only_opsd):
    tests = ["-q", "-m", "not slow and not long", "-p", "no:cacheprovider", "tests/opsd"]
    process = run(only_opsd, "import pytest; sys.exit(pytest.main(sys.argv[1:]))", *tests)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
