"""The folders' pages list their files as they are."""

import re
from pathlib import Path

import pytest

import folder_pages

ROOT = Path(__file__).resolve().parents[1]


def test_every_folder_of_code_has_its_page():
    folders = {path.parent for name in ("opsd", "tip", "scripts") for path in (ROOT / name).rglob("*.py")}
    with_code = {folder for folder in folders if any(file.stat().st_size for file in folder.glob("*.py"))}
    assert {page.parent for page in folder_pages.pages()} == with_code


@pytest.mark.parametrize("page", folder_pages.pages(), ids=lambda page: str(page.parent.relative_to(ROOT)))
def test_a_page_lists_the_files_as_they_are(page):
    assert page.read_text() == folder_pages.page(page), "run: python scripts/folder_pages.py"
    assert all(re.search(r"\): .", line) for line in page.read_text().splitlines() if line.startswith("- [`"))


def test_links_between_pages_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("recipes/**/*.md"), *folder_pages.pages()]
    broken = [
        (str(page.relative_to(ROOT)), link)
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert not broken
