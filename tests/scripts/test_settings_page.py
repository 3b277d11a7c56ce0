"""docs/settings*.md are what the dataclasses' comments say, and each of them says something."""

import re
from dataclasses import dataclass, field

import settings_page


def test_the_pages_are_up_to_date():
    for name, text in settings_page.pages().items():
        assert (settings_page.DOCS / name).read_text() == text, "run: python scripts/settings_page.py"


def test_every_setting_says_what_it_means():
    rows = [
        re.split(r"(?<!\\)\|", line)[1:-1]
        for line in "".join(settings_page.pages().values()).splitlines()
        if line.startswith("| `")
    ]
    assert len(rows) > 150
    assert [row[0].strip() for row in rows if len(row) != 4 or not row[3].strip()] == []
    names = {row[0].strip(" `") for row in rows}
    assert {"teacher.http.timeout_s", "selector.ratio", "cluster.nodes", "engine.backend", "max_queued"} <= names


@dataclass
class Parent:
    shared: int = 1  # the parent's words
    renamed: int = 2  # the parent's words


@dataclass
class Child(Parent):
    # Two lines
    # above, and
    above: int = 3  # one beside
    split: dict = field(default_factory=dict)  # after the last line
    renamed: int = 4
    silent: int = 5


def test_a_meaning_stands_above_or_beside_a_field_or_at_its_parents():
    assert settings_page.comments(Child) == {
        "shared": "the parent's words",
        "renamed": "the parent's words",
        "above": "Two lines above, and one beside",
        "split": "after the last line",
        "silent": "",
    }
