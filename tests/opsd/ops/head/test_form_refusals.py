"""A bias, a scale or a soft cap that makes no logits is refused by name."""

import math

import pytest
import torch

from opsd.ops.head.form import HeadForm
from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.losses.divergences import reverse_kl
from tests.opsd.ops.head.reference import make_head, make_support


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bias_V": torch.zeros(15)}, r"bias_V must have shape \(16,\), got \(15,\)"),
        ({"form": HeadForm(scale=0.0)}, "form.scale must be a number other than 0, got 0.0"),
        ({"form": HeadForm(scale=math.nan)}, "form.scale must be a number other than 0, got nan"),
        ({"form": HeadForm(soft_cap=0.0)}, "form.soft_cap must be above 0, or None for no cap, got 0.0"),
        ({"form": HeadForm(soft_cap=-30.0)}, "form.soft_cap must be above 0, or None for no cap, got -30.0"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_by_name(changed, message):
    hidden, weight, _ = make_head()
    support = make_support(7, 4)
    with pytest.raises(ValueError, match=message):
        bucket_logprobs(hidden, weight, support, **changed)
    with pytest.raises(ValueError, match=message):
        sparse_head_loss(hidden, weight, support, torch.zeros(7, 5), torch.ones(7), reverse_kl, **changed)
