"""The figures of an evaluation against cases worked out by hand."""

from itertools import combinations

import pytest

from opsd.errors import DataError
from opsd.evaluation.results import Answer, ProblemResult, ToolUse, Turn, read_results, write_results
from opsd.evaluation.scores import majority, pass_at_k, summarise
from opsd.evaluation.table import accuracy_table, parts_table, tools_table


def answers(*given):
    """Each (extracted, correct) or (extracted, correct, tokens, truncated)."""
    return tuple(
        Answer(text="", extracted=extracted, correct=correct, tokens=rest[0] if rest else 1, truncated=bool(rest[1:]))
        for extracted, correct, *rest in given
    )


def problem(row, *given, source="a"):
    return ProblemResult(data_source=source, row=row, reference="1", prompt="?", answers=answers(*given))


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k", "expected"),
    [
        (4, 1, 2, 0.5),  # of the 6 pairs 3 hold the right one
        (5, 2, 3, 0.9),  # of the 10 triples 1 misses both
        (4, 3, 2, 1.0),  # no two wrong ones to draw
        (4, 0, 4, 0.0),
        (16, 1, 1, 1 / 16),
    ],
)
def test_pass_at_k_by_hand(num_samples, num_correct, k, expected):
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_answer():
    for num_correct in range(7):
        is_right = [place < num_correct for place in range(6)]
        for k in range(1, 7):
            draws = list(combinations(is_right, k))
            assert pass_at_k(6, num_correct, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([("18", True), ("7", False), ("18", True)], 1.0),
        ([("18", True), ("7", False), ("7", False)], 0.0),
        ([("18", True), ("7", False)], 0.5),  # a tie of two
        ([("18", True), ("7", False), ("8", False)], 1 / 3),  # a tie of three
        ([("18", True), ("7", False), ("7", False), ("18", True), ("9", False)], 0.5),
        ([("18", True), (None, False), (None, False)], 1.0),  # what was not found has no vote
        ([(None, False), (None, False)], 0.0),
    ],
)
def test_majority_by_hand(given, expected):
    assert majority(answers(*given)) == pytest.approx(expected, abs=1e-12)


def test_the_figures_are_means_over_problems_by_source_and_over_all():
    results = [
        problem(0, ("1", True, 2), ("1", True, 4), ("5", False, 6), ("5", False, 8, True)),
        problem(1, ("1", True, 2), ("6", False, 2), ("7", False, 2), ("6", False, 2)),
        problem(0, ("6", False, 1, True), ("6", False, 1), (None, False, 1), (None, False, 1), source="b"),
    ]
    figures = summarise(results)
    assert list(figures) == ["a", "b", "all"]
    assert figures["a"] == pytest.approx({
        "problems": 2, "mean@4": 3 / 8, "maj@4": 0.25, "pass@1": 3 / 8, "pass@2": (5 / 6 + 1 / 2) / 2, "pass@4": 1.0,
        "truncated": 1 / 8, "mean_tokens": 3.5,
    })  # fmt: skip
    assert figures["b"]["truncated"] == 0.25
    assert figures["all"]["mean@4"] == pytest.approx(3 / 12)
    assert list(summarise(results[:2])) == ["a"]


def test_pass_is_given_for_k_that_is_no_power_of_two():
    assert [name for name in summarise([problem(0, *[("1", True)] * 6)])["a"] if name.startswith("pass")] == [
        "pass@1", "pass@2", "pass@4", "pass@6",
    ]  # fmt: skip


def test_without_a_grader_there_is_no_accuracy():
    assert set(summarise([problem(0, (None, None, 3))])["a"]) == {"problems", "truncated", "mean_tokens"}


def scored(row, *given):
    """Each (score, part "a", part "b"), or None: a thought that did not end."""
    return ProblemResult(data_source="plans", row=row, reference="1", prompt="?", answers=tuple(
        Answer(text="", extracted=None, correct=bool(of) and of[0] == 1.0, tokens=1, truncated=not of,
               score=of and of[0], parts=of and {"a": of[1], "b": of[2]})
        for of in given
    ))  # fmt: skip


def test_scores_have_a_mean_a_best_and_means_of_their_parts():
    results = [scored(0, (1.0, 1, 1), (0.5, 1, 0)), scored(1, None, (0.25, 0, 0.5))]
    figures = summarise(results)["plans"]
    assert figures == pytest.approx({
        "problems": 2, "mean@2": 1 / 4, "avg@2": (1.5 / 2 + 0.25 / 2) / 2, "best@2": (1 + 0.25) / 2, "pass@1": 1 / 4,
        "pass@2": 1 / 2, "truncated": 1 / 4, "mean_tokens": 1, "part/a": 2 / 4, "part/b": 1.5 / 4,
    })  # fmt: skip


def test_right_and_wrong_beside_scores():
    """Together right counts as 1; no part of a score is of both. A figure that a source lacks is a dash."""
    figures = summarise([problem(0, ("1", True), ("2", False)), scored(0, (1.0, 1, 1), (0.5, 1, 0))])
    assert figures["all"]["avg@2"] == pytest.approx((0.5 + 0.75) / 2)
    assert not any(name.startswith("part/") for name in [*figures["a"], *figures["all"]])
    head, _, *rows = [line.strip("| ").split(" | ") for line in accuracy_table({"m": figures}).splitlines()]
    assert [row[head.index("maj@2")] for row in rows] == ["0.500", "–", "–"]
    assert [row[head.index("best@2")] for row in rows] == ["–", "1.000", "1.000"]
    assert parts_table({"m": figures}).splitlines() == [
        "| part of the score | m, plans |", "| --- | --- |", "| a | 1.000 |", "| b | 0.500 |",
    ]  # fmt: skip
    assert parts_table({"m": {"a": figures["a"]}}) == ""


def with_tools(row, *given, source="a"):
    """Each (tokens of the model, tokens behind the prompt, turns, end, calls, failures)."""
    return ProblemResult(data_source=source, row=row, reference="1", prompt="?", answers=tuple(
        Answer(text="", extracted=None, correct=False, tokens=tokens, truncated=False, tool_use=ToolUse(
            turns=tuple(Turn(wrote="a", read="" if last else "b") for last in (*[False] * (turns - 1), True)),
            end=end, num_calls=calls, failures=failures, num_read=read,
        ))
        for tokens, read, turns, end, calls, failures in given
    ))  # fmt: skip


def test_how_tools_were_used_by_hand():
    """Counts are sums over answers, turns a mean over them, the share of tokens one of all tokens."""
    results = [
        with_tools(0, (10, 30, 3, "answered", 4, {"raised": 1}), (5, 5, 1, "tool", 1, {})),
        with_tools(1, (5, 5, 1, "answered", 0, {}), (20, 40, 3, "max_turns", 2, {"raised": 1, "malformed": 1})),
    ]
    figures = summarise(results)["a"]
    assert {name.removeprefix("tools/"): value for name, value in figures.items() if name.startswith("tools/")} == {
        "trajectories": 4, "turns": 2.0, "turns_max": 3, "token_share": 0.5, "calls": 7, "failed": 3,
        "failed/malformed": 1, "failed/raised": 2, "ended/answered": 2, "ended/max_turns": 1, "ended/cut": 0,
        "ended/no_room": 0, "ended/tool": 1,
    }  # fmt: skip
    plain = summarise([problem(0, ("1", True))])["a"]
    table = tools_table({"m": {"a": figures}, "n": {"a": plain}}).splitlines()
    assert table[0] == "| tools | m, a |" and "| turns | 2.000 |" in table and "| failed/raised | 2 |" in table
    assert tools_table({"n": {"a": plain}}) == "" and "turns" not in accuracy_table({"m": {"a": figures}})


def test_results_read_back_as_written(tmp_path):
    results = [problem(0, ("1", True, 5), (None, False)), problem(1, ("ä", None)), scored(2, (0.5, 1, 0), None)]
    results.append(with_tools(3, (10, 30, 3, "answered", 4, {"raised": 1})))
    write_results(tmp_path / "a.jsonl", results)
    assert read_results(tmp_path / "a.jsonl") == results


OTHER_LINES = (
    '{"step": 1}', '{"answers": [{"text": 1}]}', '{"answers": []}', '{"answers": 5}', '{"answers": [1]}',
    '{"answers": [{"tool_use": 1}]}', '{"answers": [{"tool_use": {"turns": [1]}}]}',
)  # fmt: skip


@pytest.mark.parametrize("line", OTHER_LINES)
def test_another_jsonl_file_is_refused(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(DataError, match="a.jsonl, line 1: not a problem's result as opsd.evaluate writes it"):
        read_results(tmp_path / "a.jsonl")
