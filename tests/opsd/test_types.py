"""TokenStats keeps its statistics side by side, and the optional ones all or none."""

from dataclasses import fields

import pytest
import torch

from opsd.types import TokenStats

EXTRA = ("hellinger_T", "mine_T")
NAMES = [*(field.name for field in fields(TokenStats) if field.name != "extra"), *EXTRA]


def make_stats(num_tokens, *, start=0.0, without=()):
    """Statistic number i of token t is 100 i + start + t."""
    values = {name: 100.0 * i + start + torch.arange(num_tokens) for i, name in enumerate(NAMES)}
    return stats_of({name: value for name, value in values.items() if name not in without})


def stats_of(values):
    extra = {name: value for name, value in values.items() if name in EXTRA}
    return TokenStats(**{name: value for name, value in values.items() if name not in EXTRA}, extra=extra)


def test_concatenate_take_and_to_treat_every_statistic_alike():
    joined = TokenStats.concatenate([make_stats(3), make_stats(0), make_stats(2, start=3.0)])
    found = joined.take(torch.tensor([4, 0])).to("cpu")
    assert len(joined) == 5
    for i, name in enumerate(NAMES):
        assert joined.known()[name].tolist() == [100.0 * i + t for t in range(5)]
        assert found.known()[name].tolist() == [100.0 * i + 4, 100.0 * i]
    assert tuple(joined.extra) == tuple(found.extra) == EXTRA


def test_what_no_part_has_stays_unknown():
    optional = ("hellinger_T", "compatibility_T")
    joined = TokenStats.concatenate([make_stats(3, without=optional), make_stats(2, without=optional)])
    found = joined.take(torch.tensor([1])).to("cpu")
    for name in optional:
        assert name not in joined.known() and name not in found.known()
    assert found.compatibility_T is None and tuple(found.extra) == ("mine_T",)
    assert found.teacher_entropy_T.tolist() == [100.0 * NAMES.index("teacher_entropy_T") + 1]


@pytest.mark.parametrize("name", ["teacher_entropy_T", "mine_T"])
def test_a_statistic_that_only_some_parts_have_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be known of all 3 parts or of none, got 2"):
        TokenStats.concatenate([make_stats(3), make_stats(2, without=(name,)), make_stats(1)])


def test_an_extra_statistic_has_a_name_of_its_own():
    values = torch.zeros(3)
    with pytest.raises(ValueError, match="extra must have names of its own, got entropy_T"):
        TokenStats(entropy_T=values, reverse_kl_T=values, forward_kl_T=values, extra={"entropy_T": values})


@pytest.mark.parametrize("name", NAMES[1:])
def test_statistics_of_other_lengths_are_refused(name):
    values = {each: torch.zeros(3 if each == name else 4) for each in NAMES}
    with pytest.raises(ValueError, match=rf"{name} must have shape \(4,\), got \(3,\)"):
        stats_of(values)
