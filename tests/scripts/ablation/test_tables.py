"""RESULTS.md is what the script makes of the raw lines, and its numbers are those of the lines."""

import re

import numpy as np
import pytest

from opsd.errors import DataError
from scripts.ablation.comparison import area, comparison, mean_at_8, mean_at_tokens
from scripts.ablation.records import ROOT, append, read
from scripts.ablation.tables import page, reading, write
from tests.scripts.ablation.raw_runs import made_up_run, made_up_runs

RESULTS = ROOT / "recipes" / "results" / "ablation"


def rows_of(text, title):
    block = text[text.index(f"### {title}") :].split("\n### ")[0 if title.startswith("Which") else 0]
    lines = [line for line in block.split("### ")[1].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.mark.skipif(not RESULTS.exists(), reason="no results of the ablation are committed yet")
def test_the_committed_page_is_what_its_raw_lines_make():
    assert (RESULTS / "RESULTS.md").read_text() == page(read(RESULTS))


def test_the_page_has_a_line_for_each_arm_with_its_intervals(tmp_path):
    for run in made_up_runs():
        append(tmp_path, run)
    text = page(read(tmp_path))
    rows = rows_of(text, "After equal steps")
    assert list(rows) == ["all", "random@0.2", "entropy@0.2"]
    assert rows["all"][2] == "" and rows["random@0.2"][3] == ""  # of itself
    runs = comparison("sums", made_up_runs())
    gap = np.mean([mean_at_8(own).mean() - mean_at_8(base).mean() for own, base in runs.pairs("entropy@0.2")])
    number = re.compile(r"\*\*([+-]\d\.\d{3})\*\* \(([+-]\d\.\d{3}) to ([+-]\d\.\d{3})\)")
    mean, low, high = map(float, number.fullmatch(rows["entropy@0.2"][2]).groups())
    assert mean == pytest.approx(gap, abs=5e-4) and 0 < low < mean < high
    assert number.fullmatch(rows["entropy@0.2"][3])  # and it beats random tokens
    assert not rows["random@0.2"][2].startswith("**")
    equal = rows_of(text, "After equal trained tokens")
    assert equal["entropy@0.2"][0] == "0.200" and "all" not in equal


def test_what_it_says_is_what_stands_out(tmp_path):
    """entropy@0.2 is made far better than all others, the random tokens as good as all; 0.1 of theirs far worse."""
    runs = [*made_up_runs(), *(made_up_run("random@0.1", seed, final_share=0.1) for seed in range(3))]
    lines = reading(comparison("sums", runs))
    equal_steps, random_fifth = (
        lines.index("- Than `all`, after equal steps:"),
        lines.index("- Than as many random tokens, a share of 0.2:"),
    )
    better, worse, neither = lines[equal_steps + 1 : equal_steps + 4]
    assert better.startswith("  - better: `entropy@0.2` **+0.") and "random" not in better
    assert worse.startswith("  - worse: `random@0.1` **-0.") and "," not in worse
    assert neither.startswith("  - not told apart: `random@0.2` ")
    assert lines[random_fifth + 1].startswith("  - better: `entropy@0.2`")
    assert lines[random_fifth + 2 : random_fifth + 4] == ["  - worse: none", "  - not told apart: none"]


@pytest.mark.slow
def test_the_page_and_the_figure_are_written(tmp_path):
    for run in made_up_runs():
        append(tmp_path, run)
    write(tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == page(read(tmp_path))
    assert (tmp_path / "sums.png").stat().st_size > 10_000


def test_the_baseline_is_read_where_it_had_as_many_tokens():
    run = made_up_run("all", 0, final_share=0.8)
    first, middle, last = (np.array(list(each["samples"]), dtype=float) / 8 for each in run["evaluations"])
    np.testing.assert_allclose(mean_at_tokens(run, 0), first)
    np.testing.assert_allclose(mean_at_tokens(run, 5_000), 0.75 * first + 0.25 * middle)
    np.testing.assert_allclose(mean_at_tokens(run, 30_000), (middle + last) / 2)
    np.testing.assert_allclose(mean_at_tokens(run, 10**9), last)
    np.testing.assert_allclose(area(run), (first + 2 * middle + last) / 4)


def test_an_arm_that_lacks_a_seed_stands_in_no_table():
    runs = comparison("sums", made_up_runs()[:-1])
    assert list(runs.runs) == ["all", "random@0.2"] and runs.incomplete == ["entropy@0.2"]


def test_runs_that_cannot_be_compared_are_refused():
    with pytest.raises(DataError, match=r"raw/sums.jsonl: the arm all is missing"):
        comparison("sums", made_up_runs()[1:3])
    base, other, _ = made_up_runs()[:3]
    other["evaluations"][0]["samples"] = "0" * 30
    with pytest.raises(DataError, match=r"random@0.2 and all with seed 0 must start from one student"):
        comparison("sums", [base, other])
