"""TokenStats keeps its statistics side by side, and the optional ones all or none."""

from dataclasses import fields

import pytest
import torch

from opsd.types import TokenStats

NAMES = [field.name for field in fields(TokenStats)]


def make_stats(num_tokens, *, start=0.0, without=()):
    """Statistic number i of token t is 100 i + start + t."""
    values = {name: 100.0 * i + start + torch.arange(num_tokens) for i, name in enumerate(NAMES)}
    return TokenStats(**{name: value for name, value in values.items() if name not in without})


def test_concatenate_take_and_to_treat_every_statistic_alike():
    joined = TokenStats.concatenate([make_stats(3), make_stats(0), make_stats(2, start=3.0)])
    found = joined.take(torch.tensor([4, 0])).to("cpu")
    assert len(joined) == 5
    for i, name in enumerate(NAMES):
        assert getattr(joined, name).tolist() == [100.0 * i + t for t in range(5)]
        assert getattr(found, name).tolist() == [100.0 * i + 4, 100.0 * i]


def test_what_no_part_has_stays_unknown():
    optional = ("hellinger_T", "compatibility_T")
    joined = TokenStats.concatenate([make_stats(3, without=optional), make_stats(2, without=optional)])
    found = joined.take(torch.tensor([1])).to("cpu")
    for name in optional:
        assert getattr(joined, name) is None and getattr(found, name) is None
    assert found.grad_norm_T.tolist() == [100.0 * NAMES.index("grad_norm_T") + 1]


def test_a_statistic_that_only_some_parts_have_is_refused():
    with pytest.raises(ValueError, match="grad_norm_T must be known of all 3 parts or of none, got 2"):
        TokenStats.concatenate([make_stats(3), make_stats(2, without=("grad_norm_T",)), make_stats(1)])


@pytest.mark.parametrize("name", NAMES[1:])
def test_statistics_of_other_lengths_are_refused(name):
    values = {each: torch.zeros(3 if each == name else 4) for each in NAMES}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(4,\), got \(3,\)"):
        TokenStats(**values)
