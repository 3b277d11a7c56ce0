"""A temperature of its own for each token, on bucket log-probabilities."""
# N tokens, B buckets

from __future__ import annotations

from torch import Tensor


def temper(logprobs_NB: Tensor, temperature_N: Tensor) -> Tensor:
    """The log of q_b^(1 / temperature), renormalised over the buckets of each row: [N, B], nats.

    `temperature_N` > 0; 1 changes nothing. A bucket without mass (-inf) stays so. The rest bucket counts as one token:
    a temperature above 1 cannot lift the tokens within it apart, so it gains less mass than they would. It is meant for
    the teacher, of which only buckets are known; the student's logits are divided before they become buckets
    (`temperature_N` of `opsd.ops.buckets`). Raises ValueError where the shapes do not fit. Source: METHODS section 3.
    """
    if temperature_N.shape != logprobs_NB.shape[:-1]:
        raise ValueError(
            f"temperature_N must have shape {tuple(logprobs_NB.shape[:-1])}, got {tuple(temperature_N.shape)}"
        )
    return (logprobs_NB / temperature_N[..., None]).log_softmax(-1)
