"""Work divided and put back together: nothing is lost, nothing is too large."""

import random

import pytest

from opsd.engines.groups import TokensInFlight, in_order, split_by_tokens, split_evenly


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


def test_engines_have_tokens_in_even_shares_whatever_the_number_of_answers():
    """Contiguous: 100 | 30 40 30 | 60 40."""
    in_flight = TokensInFlight(3)
    assert in_flight.split([100, 30, 40, 30, 60, 40]) == [range(1), range(1, 4), range(4, 6)]
    assert in_flight.tokens == [100, 100, 100]


def test_one_answer_after_another_goes_to_who_has_least():
    in_flight = TokensInFlight(3)
    takers = [next(n for n, own in enumerate(in_flight.split([size])) if own) for size in (50, 10, 10, 10, 10, 5)]
    assert len(set(takers[:3])) == 3
    assert max(in_flight.tokens) == 50 and min(in_flight.tokens) >= 20


def test_what_is_done_is_no_longer_in_flight():
    in_flight = TokensInFlight(2)
    in_flight.split([10])
    first = in_flight.tokens.index(10)
    in_flight.done(first, 10)
    assert in_flight.tokens == [0, 0]
    in_flight.split([10])
    assert in_flight.tokens.index(10) == first  # as before: a step's split does not depend on the steps before it


@pytest.mark.parametrize("num_engines", [1, 2, 5])
def test_a_split_loses_nothing_and_stays_even_but_for_an_answer_or_two(num_engines):
    rng = random.Random(num_engines)
    in_flight = TokensInFlight(num_engines)
    for _ in range(200):
        sizes = [rng.choice((1, 20, 400)) * rng.randint(1, 5) for _ in range(rng.randint(0, 30))]
        parts = in_flight.split(sizes)
        assert [index for part in parts for index in part] == list(range(len(sizes)))
    assert max(in_flight.tokens) - min(in_flight.tokens) <= 2 * 2000  # two of the longest


def test_results_come_back_by_their_places():
    assert in_order([{2: "c"}, {0: "a", 3: "d"}, {1: "b"}]) == ["a", "b", "c", "d"]
