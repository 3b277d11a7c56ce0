"""What the documents name is there: files, functions, methods, and the headings that docstrings cite."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("opsd", "tip", "scripts")
SOURCES = {path: path.read_text() for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
FORMULAS = {name: (ROOT / "docs" / name).read_text() for name in ("methods.md", "losses.md", "selection.md")}
HEADINGS = {name: re.findall(r"^## (.+)$", text, re.MULTILINE) for name, text in FORMULAS.items()}


@pytest.mark.parametrize(
    "document",
    [*(f"docs/{name}" for name in FORMULAS), "docs/glossary.md", "docs/design.md", "CONTRIBUTING.md", "SECURITY.md"],
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


def test_the_way_of_a_teachers_log_probability_is_short_and_as_the_design_says():
    """From vLLM's output to the loss: at most 13 files and 7 records."""
    section = (ROOT / "docs/design.md").read_text().partition("## Where the payload goes")[2].partition("\n## ")[0]
    files = re.findall(r"^\| \d+ \| `(opsd/[\w/]+\.py)` \|", section, re.MULTILINE)
    records = re.findall(r"^\| \d+ \| `([A-Z]\w+)` \| `(opsd/[\w/]+\.py)` \|", section, re.MULTILINE)
    assert 0 < len(files) <= 13
    assert 0 < len(records) <= 7
    defined = {(name, file): rf"^class {name}\b" for name, file in records}
    assert [each for each, line in defined.items() if not re.search(line, SOURCES[ROOT / each[1]], re.MULTILINE)] == []
    # Each file speaks of such a record, but for the loss, which has tensors: one that only renames it would not.
    names = "|".join(name for name, _ in records)
    speaks = [bool(re.search(rf"\b(?:{names})\b", SOURCES[ROOT / file])) for file in files]
    assert speaks == [True] * (len(files) - 1) + [False]


def test_headings_that_docstrings_cite_exist():
    cited = {
        (path.relative_to(ROOT), page, heading)
        for path, text in SOURCES.items()
        for page, found in re.findall(r"docs/(\w+\.md),\s+([A-Z][a-z -]+(?: and [A-Z][a-z -]+)?)[.;]", text)
        for heading in ([found] if found in HEADINGS[page] else found.split(" and "))
    }
    assert len(cited) >= 10
    assert {entry for entry in cited if entry[2] not in HEADINGS[entry[1]]} == set()


def test_every_method_has_its_place_in_the_formulas():
    methods = {path.stem for path in (ROOT / "tip/conf/method").glob("*.yaml")}
    text = "".join(FORMULAS.values())
    assert {name for name in methods if not re.search(rf"\bmethod={name}\b|`{name}`", text)} == set()


def test_every_score_and_selector_has_its_place_in_the_formulas():
    text = FORMULAS["selection.md"]
    names = {path.stem for path in (ROOT / "tip/conf/selector").glob("*.yaml")}
    assert {name for name in names if f"`{name}`" not in text} == set()


@pytest.mark.parametrize("page", FORMULAS)
def test_links_between_the_formulas_lead_to_headings(page):
    links = re.findall(r"\]\((\w*(?:\.md)?)#([\w-]+)\)", FORMULAS[page])
    anchors = {name: {heading.lower().replace(" ", "-") for heading in found} for name, found in HEADINGS.items()}
    assert [link for link in links if link[1] not in anchors[link[0] or page]] == []


def test_nothing_cites_what_a_reader_cannot_open():
    found = subprocess.run(
        ["grep", "-rnE", r"METHODS section|\.\./shared", *PACKAGES, "docs", "README.md", "recipes"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert [line for line in found.stdout.splitlines() if "__pycache__" not in line and "Binary" not in line] == []
