"""Every loss by the name that `loss.divergence` and `loss.terms` have for it.

    LOSSES[name](student_logprobs_NB, teacher_logprobs_NB, **inputs, **options) -> [N]

An entry is a `Loss`, which states the row inputs that it needs and whether it is a sum over tokens, or a plain
function, which needs none: `LOSSES["mine"] = Loss(mine, inputs=("advantage_N",))`. What is added to DIVERGENCES is here
too.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable

from torch import Tensor

from opsd.ops.losses.divergences import DIVERGENCES, forward_then_reverse
from opsd.ops.losses.objective import Loss
from opsd.ops.losses.policy import kdrl, kdrl_advantage, kdrl_mask, policy_gradient
from opsd.ops.losses.residual import residual_reverse_kl
from opsd.ops.losses.sampled import power, sign_gate, sign_log, trust
from opsd.ops.losses.terms import dac_kl, kendall, pearson, sinkhorn

BEYOND_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_then_reverse": Loss(forward_then_reverse, inputs=("reverse_share_N",), by_token=True),
    "policy_gradient": Loss(policy_gradient, inputs=("advantage_N",), has_value=False, needs_own_draws=True),
    "kdrl": Loss(kdrl, inputs=("advantage_N",), has_value=False, needs_own_draws=True),
    "kdrl_advantage": Loss(kdrl_advantage, inputs=("advantage_N",), has_value=False, needs_own_draws=True),
    "kdrl_mask": Loss(kdrl_mask, inputs=("advantage_N", "wrong_N"), has_value=False, needs_own_draws=True),
    "sign_log": Loss(sign_log, has_value=False, needs_own_draws=True),
    "power": Loss(power, has_value=False, needs_own_draws=True),
    "sign_gate": Loss(sign_gate, has_value=False, needs_own_draws=True),
    "trust": Loss(trust),
    "pearson": Loss(pearson, only_beside=True),
    "kendall": Loss(kendall, only_beside=True),
    "sinkhorn": Loss(sinkhorn, inputs=("support_NU",), only_beside=True),
    "dac_kl": Loss(dac_kl, only_beside=True),
}
LOSSES = ChainMap(BEYOND_DIVERGENCES, DIVERGENCES)
# What `loss.residual=true` puts in the place of a divergence: on average over the sampled token, the gradient of the
# dense one.
UNBIASED: dict[str, Loss] = {"reverse_kl": Loss(residual_reverse_kl, inputs=("outside_N", "teacher_tail_N"))}
REFUSED = {
    "k1": "log pi(y) - log q(y) backpropagated directly has a gradient of 0 in expectation: use kdrl, whose k2 "
    "has that of the reverse KL",
}
