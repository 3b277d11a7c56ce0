"""The step files: what they hold after NaN, a kill in the middle of a line, and a resume."""

import json
import resource
import signal

import numpy as np
import pytest

from opsd.errors import DataError
from opsd.monitor.jsonl import append_jsonl, read_jsonl, truncate_jsonl


def strict_lines(path):
    """The file's lines by a parser that refuses NaN and Infinity, as every other program's does."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_non_finite_numbers_are_written_as_null_at_any_depth(tmp_path):
    path = tmp_path / "m.jsonl"
    record = {"step": np.int64(3), "loss": float("nan"), "entropy": [0.5, float("inf")], "x": np.float32(0.25)}
    append_jsonl(path, record)
    assert strict_lines(path) == [{"step": 3, "loss": None, "entropy": [0.5, None], "x": 0.25}]
    assert isinstance(strict_lines(path)[0]["step"], int)


def test_a_line_for_which_there_is_no_room_leaves_no_half(tmp_path):
    """Of what the limit of this process lets through, as of a disk that is nearly full, a part is written."""
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"step": 1})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            append_jsonl(path, {"step": 2, "text": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    append_jsonl(path, {"step": 3})
    assert strict_lines(path) == [{"step": 1}, {"step": 3}]


def test_a_line_cut_off_by_a_kill_is_passed_over_and_removed_on_resume(tmp_path):
    path = tmp_path / "m.jsonl"
    append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]
    truncate_jsonl(path, 1)
    append_jsonl(path, {"step": 2})
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_truncate_keeps_all_lines_of_the_step_itself(tmp_path):
    path = tmp_path / "m.jsonl"
    for record in ({"step": 4}, {"step": 5, "loss": 1.0}, {"step": 5, "eval/accuracy": 0.5}, {"step": 6}):
        append_jsonl(path, record)
    truncate_jsonl(path, 5)
    assert strict_lines(path) == [{"step": 4}, {"step": 5, "loss": 1.0}, {"step": 5, "eval/accuracy": 0.5}]
    truncate_jsonl(tmp_path / "absent.jsonl", 5)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize("bad", ["nonsense", "[1, 2]", '{"loss": 1.0}'])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, bad):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + bad + '\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"m\.jsonl, line 2"):
        read_jsonl(path)
