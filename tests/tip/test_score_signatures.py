"""Scores of a user's own that take more than (stats, options) by name."""

import pytest

from tests.tip.test_plugin import make_batch, same, select
from tip.scores import SCORES


@pytest.mark.parametrize(
    "score",
    [
        lambda stats, options, **kw: stats.entropy_T,
        lambda stats, options, *, sharpness=1.0: stats.entropy_T**sharpness,
        lambda *both: both[0].entropy_T,
    ],
    ids=["any options", "an option of its own", "any arguments"],
)
def test_own_scores_of_freer_signatures_are_taken(monkeypatch, score):
    monkeypatch.setitem(SCORES, "mine", score)
    assert same(select(make_batch(), score="mine", ratio=0.2), select(make_batch(), score="entropy", ratio=0.2))
