"""Writes the list of files in the README.md of every folder of code: python scripts/folder_pages.py

What stands above "## Files" in such a page is written by hand and stays; below it there is a line per file, the first
sentence of its docstring (of a bash file, its first comment). A test compares the pages with what this would write.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING = "## Files"
SENTENCE = re.compile(r"(.+?[.?])(?:\s|$)", re.DOTALL)


def pages() -> list[Path]:
    """README.md of every folder that has one with a list of files."""
    tracked = [path for folder in ("opsd", "tip", "scripts") for path in (ROOT / folder).rglob("README.md")]
    return sorted(path for path in tracked if HEADING in path.read_text())


def page(path: Path) -> str:
    """What stands in the page at `path`, with its list of files as they are now."""
    head = path.read_text().split(HEADING)[0]
    files = sorted(file for file in path.parent.iterdir() if file.suffix in (".py", ".sh") and file.stat().st_size)
    lines = [f"- [`{file.name}`]({file.name}): {first_sentence(file)}" for file in files]
    return f"{head}{HEADING}\n\n" + "\n".join(lines) + "\n"


def first_sentence(file: Path) -> str:
    """What a file says of itself first, without its full stop."""
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(file.read_text())) or ""
    else:
        comments = re.match(r"#!.*\n((?:#.*\n)*)", file.read_text())
        text = re.sub(r"^# ?", "", comments[1], flags=re.MULTILINE) if comments else ""
    paragraph = text.split("\n\n")[0]
    found = SENTENCE.match(paragraph)
    return " ".join((found[1] if found else paragraph).split()).rstrip(".:")


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit(__doc__)
    for path in pages():
        path.write_text(page(path))


if __name__ == "__main__":
    main()
