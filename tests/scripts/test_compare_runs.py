"""The paired bootstrap: its interval, its pairing, its refusals."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from opsd.errors import DataError
from opsd.evaluation.compare import compare, paired_interval
from opsd.evaluation.results import Answer, ProblemResult, write_results


def write_run(path, shares, *, source="a", reference="1", k=4):
    """`shares`: of each problem's k answers, how many are right."""
    answer = Answer(text="", extracted="1", correct=True, tokens=1, truncated=False)
    wrong = replace(answer, correct=False)
    results = [
        ProblemResult(
            data_source=source,
            row=row,
            reference=reference,
            prompt="?",
            answers=(answer,) * share + (wrong,) * (k - share),
        )
        for row, share in enumerate(shares)
    ]
    write_results(path, results)
    return path


def test_the_interval_is_that_of_the_normal_approximation():
    """Of 400 differences the mean is close to normal: mean plus and minus 1.96 standard errors."""
    differences = np.random.default_rng(1).choice([-0.25, 0.0, 0.5, 1.0], size=400)
    low, high = paired_interval(differences, 10_000, seed=0)
    error = 1.96 * differences.std() / 20
    assert low == pytest.approx(differences.mean() - error, abs=0.05 * error)
    assert high == pytest.approx(differences.mean() + error, abs=0.05 * error)


def test_problems_are_paired(tmp_path):
    """Both runs vary much from problem to problem, always by the same amount: the interval has no width."""
    before = write_run(tmp_path / "before.jsonl", [0, 1, 2, 3] * 5)
    after = write_run(tmp_path / "after.jsonl", [1, 2, 3, 4] * 5)
    table = compare([f"old={before}", str(after)], 200, 0)
    assert table.splitlines()[-1] == ("| a | 20 | after | 0.625 | old | 0.375 | +0.250 | +0.250 to +0.250 |")


def test_every_source_and_all_of_them_have_a_line(tmp_path):
    for name, shares in (("x", [0, 4]), ("y", [4, 4])):
        first = write_run(tmp_path / "1.jsonl", shares).read_text()
        second = write_run(tmp_path / "2.jsonl", shares[:1], source="b").read_text()
        (tmp_path / f"{name}.jsonl").write_text(first + second)
    lines = compare([str(tmp_path / "x.jsonl"), str(tmp_path / "y.jsonl")], 100, 0).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| a", "| b", "| all"]
    assert "+1.000 to +1.000" in lines[1] and "+0.667" in lines[2]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"shares": [1, 1, 1]}, "after has 3 problems, before has 2"),
        ({"shares": [1, 1], "source": "b"}, "line 1: another problem than before's: expected .* got ('b', 0, '1')"),
        ({"shares": [1, 1], "reference": "2"}, "got ('a', 0, '2')"),
    ],
)
def test_other_problems_are_refused(tmp_path, other, said):
    before = write_run(tmp_path / "before.jsonl", [1, 1])
    after = write_run(tmp_path / "after.jsonl", **other)
    with pytest.raises(DataError, match=said.replace("(", r"\(").replace(")", r"\)")):
        compare([str(before), str(after)], 10, 0)


def test_one_run_or_an_ungraded_one_is_refused_in_a_line(tmp_path):
    before = write_run(tmp_path / "before.jsonl", [1])
    ungraded = tmp_path / "ungraded.jsonl"
    ungraded.write_text(before.read_text().replace("true", "null").replace("false", "null"))
    for runs, said in (([before], "expected two runs or more"), ([before, ungraded], "are not graded")):
        command = [sys.executable, "scripts/compare_runs.py", *map(str, runs)]
        process = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": "."})
        assert process.returncode == 1
        assert said in process.stderr and "Traceback" not in process.stderr
