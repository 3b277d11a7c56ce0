"""Which tokens a filter leaves to the selector."""

import numpy as np
import pytest
import torch

from tests.tip.batches import make_batch
from tip.config import SelectorConfig, TipRunConfig
from tip.filters import FILTERS
from tip.plugin import build_hooks

LENGTHS = (4, 2, 5, 3, 1)


def test_fire_drops_whole_rollouts_that_the_teacher_finds_least_likely():
    batch = make_batch(LENGTHS)
    means = [part.mean().item() for part in batch.tokens.teacher_logprob_T.split(LENGTHS)]
    worst_two = sorted(range(5), key=means.__getitem__)[:2]
    expected = torch.cat([torch.full((n,), r not in worst_two) for r, n in enumerate(LENGTHS)])
    assert torch.equal(FILTERS["fire"](batch, drop=0.4), expected)
    assert FILTERS["fire"](batch, drop=0.0).all()


@pytest.mark.parametrize(("num_rollouts", "dropped"), [(1, 0), (2, 1), (4, 1), (6, 1), (7, 2), (11, 2), (12, 3)])
def test_fire_drops_below_the_quantile_also_of_a_few_rollouts(num_rollouts, dropped):
    """numpy's quantile of the means, and no rollout at it goes."""
    batch = make_batch([2] * num_rollouts)
    means = np.array([part.double().mean().item() for part in batch.tokens.teacher_logprob_T.split(2)])
    stays = FILTERS["fire"](batch).view(num_rollouts, 2)
    assert stays[:, 0].tolist() == (means >= np.quantile(means, 0.2) - 1e-12).tolist()
    assert (~stays).sum().item() == 2 * dropped


@pytest.mark.parametrize(("step", "length"), [(0, 2), (1, 3), (2, 3), (3, 4)])
def test_horizon_grows_from_the_first_step_to_the_last(step, length):
    mask = FILTERS["horizon"](make_batch(LENGTHS, step=step, num_steps=4), start=2, end=4)
    assert [part.sum().item() for part in mask.split(LENGTHS)] == [min(length, n) for n in LENGTHS]
    assert all(part[: min(length, len(part))].all() for part in mask.split(LENGTHS))


@pytest.mark.parametrize("num_steps", [1, 2, 20, 300])
def test_horizon_ends_at_its_end(num_steps):
    batch = make_batch((60, 50), step=num_steps - 1, num_steps=num_steps)
    assert FILTERS["horizon"](batch, start=8, end=48).sum() == 96


def test_the_selector_takes_its_share_of_what_the_filters_leave():
    cfg = TipRunConfig(
        selector=SelectorConfig(score="divergence", ratio=0.5),
        filters={"horizon": {"start": 2, "end": 2}, "fire": {"drop": 0.4}},
    )
    batch = make_batch(LENGTHS)
    allowed = FILTERS["fire"](batch, drop=0.4) & FILTERS["horizon"](batch, start=2, end=2)
    selection = build_hooks(cfg).select(batch)
    expected = []
    for part in torch.arange(len(batch.tokens)).split(LENGTHS):
        own = [i for i in part.tolist() if allowed[i]]
        own.sort(key=lambda i: -batch.tokens.reverse_kl_T[i])
        expected += sorted(own[: max(1, len(own) // 2)]) if own else []
    assert selection.index_N.tolist() == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [("fire", {"drop": 1.0}), ("horizon", {"start": 0, "end": 4}), ("horizon", {"start": 5, "end": 4})],
)
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match="got"):
        FILTERS[name](make_batch(LENGTHS), **options)
