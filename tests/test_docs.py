"""What the documents name is there: files, functions, methods, and the headings that docstrings cite."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("opsd", "tip", "scripts")
SOURCES = {path: path.read_text() for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
METHODS = (ROOT / "docs/methods.md").read_text()
HEADINGS = re.findall(r"^## (.+)$", METHODS, re.MULTILINE)


@pytest.mark.parametrize(
    "document", ["docs/methods.md", "docs/glossary.md", "docs/design.md", "CONTRIBUTING.md", "SECURITY.md"]
)
def test_files_and_functions_that_a_document_names_exist(document):
    text = (ROOT / document).read_text()
    files = set(re.findall(r"`((?:opsd|tip|scripts|tests|docs|recipes)/[\w/.-]*\w/?)`", text))
    assert files
    assert [name for name in sorted(files) if "NAME" not in name and not (ROOT / name).exists()] == []
    # `function` in `file.py`
    named = re.findall(r"`(\w+)` in\s+`((?:opsd|tip|scripts)/[\w/]+\.py)`", text)
    missing = [(name, file) for name, file in named if not re.search(rf"\b{name}\b", (ROOT / file).read_text())]
    assert missing == []


def test_headings_that_docstrings_cite_exist():
    cited = {
        (path.relative_to(ROOT), heading)
        for path, text in SOURCES.items()
        for found in re.findall(r"docs/methods\.md,\s+([A-Z][a-z -]+(?: and [A-Z][a-z -]+)?)[.;]", text)
        for heading in ([found] if found in HEADINGS else found.split(" and "))
    }
    assert len(cited) >= 10
    assert {entry for entry in cited if entry[1] not in HEADINGS} == set()


def test_every_method_has_its_place_in_the_formulas():
    methods = {path.stem for path in (ROOT / "tip/conf/method").glob("*.yaml")}
    assert {name for name in methods if not re.search(rf"\bmethod={name}\b|`{name}`", METHODS)} == set()


def test_nothing_cites_what_a_reader_cannot_open():
    found = subprocess.run(
        ["grep", "-rnE", r"METHODS section|\.\./shared", *PACKAGES, "docs", "README.md", "recipes"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert [line for line in found.stdout.splitlines() if "__pycache__" not in line and "Binary" not in line] == []
