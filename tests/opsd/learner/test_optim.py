"""The optimiser's kernel, by where the weights are."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opsd.config.run import LearnerConfig
from opsd.learner.optim import build_optimizer


@pytest.mark.parametrize(("device", "fused"), [("cpu", None), ("cuda", True)])
def test_adamw_is_fused_where_the_weights_are_on_a_gpu(device, fused):
    """A fake tensor says where it is without being there; that the kernel runs there is untested."""
    with FakeTensorMode():
        parameter = torch.nn.Parameter(torch.empty(3, device=device))
        assert build_optimizer([parameter], LearnerConfig()).defaults["fused"] is fused
