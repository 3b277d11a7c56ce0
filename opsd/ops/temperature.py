"""A temperature of its own for each token, on bucket log-probabilities."""
# N tokens, B buckets

from __future__ import annotations

import torch
from torch import Tensor


def temper(logprobs_NB: Tensor, temperature_N: Tensor, rest_tail_N: Tensor) -> Tensor:
    """The teacher's buckets at a temperature: the log of q^(1 / temperature), normalised over the buckets, [N, B] nats.

    A named token is raised to 1 / temperature. The rest, the last bucket, is a sum over many tokens r_v of it:

        sum_v (Q_rest r_v)^(1 / temperature) = Q_rest^(1 / temperature) exp(rest_tail)
        rest_tail = log sum_v r_v^(1 / temperature) = logsumexp_v(z_v / temperature) - logsumexp_v(z_v) / temperature

    over the tokens v of the rest with logits z. The teacher's are not known, so the tail is the student's, detached
    (`Chunk.rest_tail_N`; `sparse_head_loss` passes it). With it the student equal to the teacher is the optimum, and
    the gradient at a student whose rest has the teacher's shape is that of the dense loss. As one token (a tail of 0) a
    rest of 49k tokens would lose nearly all its mass to a temperature of 1.65, and the student's would not.

    `temperature_N` > 0; 1 changes nothing. A bucket without mass (-inf) stays so. Raises ValueError where the shapes do
    not fit. Source: docs/selection.md, Schedules and temperatures.
    """
    for name, values_N in (("temperature_N", temperature_N), ("rest_tail_N", rest_tail_N)):
        if values_N.shape != logprobs_NB.shape[:-1]:
            raise ValueError(f"{name} must have shape {tuple(logprobs_NB.shape[:-1])}, got {tuple(values_N.shape)}")
    divided_NB = logprobs_NB / temperature_N[..., None]
    rest_N1 = divided_NB[..., -1:] + rest_tail_N[..., None]
    return torch.cat([divided_NB[..., :-1].to(rest_N1.dtype), rest_N1], dim=-1).log_softmax(-1)
