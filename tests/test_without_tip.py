"""opsd is whole without tip: its own tests pass in a tree where that folder is gone."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN_TESTS = (
    "import sys; sys.modules['tip'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"  # None: not importable
)


def test_opsd_passes_its_tests_without_tip(tmp_path):
    for name in ("opsd", "tests/opsd"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "scripts").mkdir()
    for name in ("tests/__init__.py", "tests/tiny_models.py", "scripts/tiny_architectures.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    command = [sys.executable, "-c", RUN_TESTS, "-q", "-m", "not slow", "-p", "no:cacheprovider", "tests/opsd"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]
    assert " passed" in process.stdout
    imported = "import opsd.train, sys; assert opsd.__path__[0].startswith(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['tip'] = None; {imported}", str(tmp_path)],
        cwd=tmp_path,
        check=True,
    )
