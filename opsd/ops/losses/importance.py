"""A loss of answers that older weights wrote, weighted by what the newest ones think of them."""
# N tokens, B buckets

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from opsd.ops.losses.objective import ROLLOUT_LOGPROB, Loss


def corrected(loss: Loss, cap: float) -> Loss:
    """`loss` with each token's value multiplied by min(cap, pi(y) / pi_rollout(y)), which is no part of the gradient.

    pi is the policy that learns and pi_rollout the one that sampled y, so that the expectation over y is that of pi as
    far as no ratio is above `cap` (truncated importance sampling, Ionides 2008; per token, as in PPO's surrogate).
    What the tokens before y say of the state's own probability is left out. A loss of the sampled event alone needs
    it. One that compares whole distributions, as a divergence does, needs none, and gets weights whose mean is 1.
    """
    return replace(
        loss,
        function=partial(_weighted, loss.function, cap),
        inputs=(*loss.inputs, ROLLOUT_LOGPROB),
        by_token=False,
        row_values={},
        needs_own_draws=False,
    )


def _weighted(
    function: Callable[..., Tensor],
    cap: float,
    student_logprobs_NB: Tensor,
    teacher_logprobs_NB: Tensor,
    *,
    rollout_logprob_N: Tensor,
    **row_inputs: Tensor,
) -> Tensor:
    """The sampled event is in slot 0."""
    ratio_N = (student_logprobs_NB[:, 0].detach() - rollout_logprob_N).exp().clamp(max=cap)
    return ratio_N * function(student_logprobs_NB, teacher_logprobs_NB, **row_inputs)
