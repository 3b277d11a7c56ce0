"""Work divided and put back together: nothing is lost, nothing is too large."""

import pytest

from opsd.engines.groups import in_order, split_by_tokens, split_evenly


def test_split_by_tokens_bounds_the_padded_size_and_loses_nothing():
    lengths = [3, 50, 7, 7, 2, 9, 12, 1]
    groups = split_by_tokens(lengths, max_tokens=20)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[index] for index in group) <= 20
    assert [1] in groups  # longer than the bound: alone
    assert len(groups) < len(lengths)


@pytest.mark.parametrize("num_parts", [1, 3, 4, 20])
def test_even_parts_differ_by_one_at_most_and_lose_nothing(num_parts):
    parts = split_evenly(range(10), num_parts)
    assert [item for part in parts for item in part] == list(range(10))
    sizes = [len(part) for part in parts]
    assert len(sizes) == num_parts and max(sizes) - min(sizes) <= 1


def test_results_come_back_by_their_places():
    assert in_order([{2: "c"}, {0: "a", 3: "d"}, {1: "b"}]) == ["a", "b", "c", "d"]
