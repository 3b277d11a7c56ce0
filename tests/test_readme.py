"""The figures in README.md are those of recipes/results/, each of which a committed command printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tables(file):
    """The Markdown tables of a file, each a list of rows by column name; a name that repeats gets " 2", " 3"."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", (ROOT / file).read_text(), re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        names = [n if head.index(n) == i else f"{n} {head[: i + 1].count(n)}" for i, n in enumerate(head)]
        found.append([dict(zip(names, row, strict=True)) for row in rows])
    return found


@pytest.fixture(scope="module")
def expected():
    """README's table "What to expect": first cell -> (before, after, teacher)."""
    [table] = [table for table in tables("README.md") if "run" in table[0] and "before" in table[0]]
    return {row["run"]: (row["before"], row["after"], row["teacher"]) for row in table}


def spread(values):
    """'low to high', or the value where all are equal."""
    low, high = min(values, key=float), max(values, key=float)
    return low if low == high else f"{low} to {high}"


def test_the_quick_start_s_figures_are_those_of_its_five_seeds(expected):
    seeds = [row for row in tables("recipes/results/quickstart.md")[0] if row["run"].startswith("seed")]
    assert [row["seed"] for row in seeds] == ["0", "1", "2", "3", "4"]
    assert expected["quick start: held-out accuracy, greedy, five seeds"] == tuple(
        spread([row[name] for row in seeds]) for name in ("accuracy before", "after", "teacher")
    )
    assert expected["quick start: reverse KL to the teacher, nats per token"] == (
        spread([row["reverse KL before"] for row in seeds]), spread([row["after 2"] for row in seeds]), "",
    )  # fmt: skip


def test_smollm2_s_figures_are_those_of_its_seeds(expected):
    seeds = [row for row in tables("recipes/results/smollm2.md")[0] if row["run"].startswith("hidden-")]
    assert [row["seed"] for row in seeds] == ["0", "1", "2"]
    where = "SmolLM2-135M to 21 of its layers, 24 steps, three seeds: reverse KL, nats per token"
    for name, column in ((where, "reverse KL"), ("the same: top-1 agreement with the teacher", "top-1")):
        after = "after 2" if column == "reverse KL" else "after 3"
        values = [[row[which] for row in seeds] for which in (f"{column} before", after)]
        assert expected[name] == (*map(spread, values), "")


def test_smollm2_s_table_is_that_of_its_summaries():
    runs = sorted((ROOT / "recipes" / "results" / "smollm2").iterdir())
    command = [sys.executable, ROOT / "scripts" / "summary_table.py", *runs]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    page = (ROOT / "recipes" / "results" / "smollm2.md").read_text().splitlines()
    assert len(runs) >= 9 and [line for line in printed if line not in page] == []


def test_what_running_ahead_saves_is_what_was_measured():
    ratios = [float(row["ratio"]) for row in tables("recipes/results/overlap.md")[0]]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{100 * min(ratios):.0f} to {100 * max(ratios):.0f} % of the loop's time" in text


def test_the_ablations_differences_are_those_of_its_page():
    """Every mean with its interval in README stands in RESULTS.md."""
    text = " ".join((ROOT / "README.md").read_text().split())
    page = (ROOT / "recipes" / "results" / "ablation" / "RESULTS.md").read_text().replace("*", "")
    found = re.findall(r"[+-]\d\.\d{3} \([+-]\d\.\d{3} to [+-]\d\.\d{3}\)", text)
    quoted = re.findall(r"\([+-]\d\.\d{3} to [+-]\d\.\d{3}\)", text)
    assert len(found) == len(quoted) >= 5
    assert [each for each in found if each not in page] == []


def test_the_table_against_trl_is_that_of_its_page():
    [table] = [table for table in tables("README.md") if "pair, trainer" in table[0]]
    tiny, smollm2, by_itself = (
        {row["trainer"]: row for row in reversed(page)} for page in tables("recipes/results/against_trl.md")
    )
    kl = "held-out reverse KL, nats"
    ours, known = "this project, log-probabilities", "held-out reverse KL, nats: before"
    expected = [  # measured in, of whom, and of whom after as much time
        (tiny, "TRL", "TRL, as long as this project"),
        (tiny, "this project", "this project"),
        (smollm2, "TRL", "TRL"),
        (smollm2, ours, f"{ours}, as long as TRL"),
        (by_itself, "this project", None),
    ]
    for row, (page, name, longer) in zip(table, expected, strict=True):
        assert row["pair, trainer"].partition(": ")[2].removesuffix(", run by itself") == name
        assert (row[known], row["after equal steps"]) == (page["neither"][kl], page[name][kl])
        assert row["peak memory, GiB"] == page[name]["peak memory, GiB"]
        same_run = longer is not None  # what was run by itself has no time to stand beside another's
        assert row["s per step"] == (page[name]["s per step"] if same_run else "")
        assert row["after equal time"] == (page[longer][kl] if same_run else "")
