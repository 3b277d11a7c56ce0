import pytest
import torch

from opsd.ops.quadrants import quadrants


def test_each_corner_has_its_number():
    entropy = torch.tensor([0.9, 0.8, 0.1, 0.2])
    divergence = torch.tensor([5.0, 0.1, 4.0, 0.2])
    assert quadrants(entropy, divergence).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("quantile", "num_high"), [(0.0, 10), (0.5, 5), (0.8, 2), (1.0, 0)])
def test_high_means_above_the_quantile(quantile, num_high):
    values = torch.randperm(11).float()
    assert torch.equal(quadrants(values, values, quantile=quantile) == 1, values >= 11 - num_high)


def test_equal_values_never_part_and_a_constant_axis_is_low():
    assert quadrants(torch.ones(4), torch.arange(4.0)).tolist() == [4, 4, 3, 3]
    assert quadrants(torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.zeros(4)).tolist() == [4, 4, 4, 2]
    assert quadrants(torch.zeros(3), torch.zeros(3)).tolist() == [4, 4, 4]


def test_no_token_and_one_token():
    assert quadrants(torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert quadrants(torch.ones(1), torch.ones(1)).tolist() == [4]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        quadrants(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="quantile"):
        quadrants(torch.zeros(3), torch.zeros(3), quantile=1.5)
