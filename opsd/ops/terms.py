"""Losses that are added to a divergence with a weight: `loss.terms={pearson: {weight: 0.1}}`.

    TERMS[name](student_logprobs_NB, teacher_logprobs_NB, **options) -> [N]

The arguments are those of a divergence, see `opsd.ops.divergences`; a term may name row inputs, see
`opsd.ops.objective`. All but `policy_gradient` compare the named tokens only and are blind to how much mass the rest
has, so none of them is a divergence: they stand beside one. Source: METHODS section 4.
"""
# N rows, B buckets, U = B - 1 named tokens, G rows of a group

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opsd.ops.policy import policy_gradient

TINY = 1e-12  # keeps the root of a variance differentiable where it is 0


def pearson(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """1 - Pearson correlation of both models' probabilities, in [0, 2].

    1 where a row names fewer than two tokens or a side is constant. Source: R2KD, arXiv 2311.13934, without its rank
    term, which has no gradient.
    """
    named_NU = _named(teacher_logprobs_NB)
    student_NU = _centred(_probs(student_logprobs_NB), named_NU)
    teacher_NU = _centred(_probs(teacher_logprobs_NB), named_NU)
    covariance_N = (student_NU * teacher_NU).sum(1)
    deviation_N = ((student_NU.square().sum(1) + TINY) * (teacher_NU.square().sum(1) + TINY)).sqrt()
    return 1.0 - covariance_N / deviation_N


def kendall(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, sharpness: float = 1.0) -> Tensor:
    """1 - Kendall's tau of both models' orders of the tokens, in [0, 2]; 1 where a row has no pair.

    The student's sign of a pair is tanh(sharpness * difference of log-probabilities), so that it has a gradient.
    Source: RKKD, arXiv 2409.17823.
    """
    named_NU = _named(teacher_logprobs_NB)
    pair_NUU = (named_NU[:, :, None] & named_NU[:, None, :]).triu(1)
    order_NUU = (_differences(teacher_logprobs_NB, named_NU)).sign()
    soft_NUU = torch.tanh(sharpness * _differences(student_logprobs_NB, named_NU))
    agreement_N = (soft_NUU * order_NUU * pair_NUU).sum((1, 2))
    return 1.0 - agreement_N / pair_NUU.sum((1, 2)).clamp_min(1)


def sinkhorn(
    student_logprobs_NB: Tensor,
    teacher_logprobs_NB: Tensor,
    *,
    support_NU: Tensor,
    group_rows: int = 32,
    temperature: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    """Cost of moving the student's rows to the teacher's rows of other positions: sum_j P_ij |p_i - q_j|_1.

    P is the entropic transport plan within a group of neighbouring rows, so a row's value depends on which rows are
    packed beside it. It carries no gradient: at the optimum its change does not count (the envelope theorem). Two rows
    are compared on the tokens that both name, and the mass of all others at once: a lower bound of the cost.
    Source: SinKD, arXiv 2402.17110.
    """
    parts = []
    for student_GB, teacher_GB, support_GU in zip(
        student_logprobs_NB.split(group_rows),
        teacher_logprobs_NB.split(group_rows),
        support_NU.split(group_rows),
        strict=True,
    ):
        cost_GG = _pairwise_l1(_probs(student_GB), _probs(teacher_GB).to(student_GB.dtype), support_GU)
        parts.append((_transport_plan(cost_GG.detach(), temperature, iterations) * cost_GG).sum(1))
    return torch.cat(parts) if parts else student_logprobs_NB.sum(1)


def dac_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, low: float = 0.5, high: float = 1.0) -> Tensor:
    """Forward KL among the tokens whose teacher's probability lies between two quantiles of the row, renormalised.

    The paper learns the quantiles with a network of its own; here they are options. A row with fewer than two tokens
    there adds 0. Source: DAC-KL, arXiv 2407.10068.
    """
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"need 0 <= low < high <= 1, got {low} and {high}")
    named_NU = _named(teacher_logprobs_NB)
    teacher_NU = teacher_logprobs_NB[:, :-1].to(student_logprobs_NB.dtype)
    bounds = torch.tensor([low, high], dtype=teacher_NU.dtype, device=teacher_NU.device)
    low_N, high_N = teacher_NU.exp().where(named_NU, torch.nan).nanquantile(bounds, dim=1)
    inside_NU = named_NU & (teacher_NU.exp() >= low_N[:, None]) & (teacher_NU.exp() <= high_N[:, None])
    none_N1 = ~inside_NU.any(1, keepdim=True)
    inside_NU = inside_NU | none_N1  # keeps log_softmax finite; the row is dropped below
    log_q_NU = teacher_NU.nan_to_num(neginf=0.0).masked_fill(~inside_NU, -torch.inf).log_softmax(1)
    log_p_NU = student_logprobs_NB[:, :-1].masked_fill(~inside_NU, -torch.inf)
    log_p_NU = log_p_NU - log_p_NU.where(inside_NU, -torch.inf).logsumexp(1, keepdim=True)
    terms_NU = log_q_NU.exp() * (log_q_NU.where(inside_NU, 0.0) - log_p_NU.where(inside_NU, 0.0))
    return terms_NU.where(inside_NU & ~none_N1, 0.0).sum(1)


TERMS: dict[str, Callable[..., Tensor]] = {
    "pearson": pearson,
    "kendall": kendall,
    "sinkhorn": sinkhorn,
    "dac_kl": dac_kl,
    "policy_gradient": policy_gradient,
}


def _named(teacher_logprobs_NB: Tensor) -> Tensor:
    """bool [N, U]: slots that hold a token."""
    return ~teacher_logprobs_NB[:, :-1].isneginf()


def _probs(logprobs_NB: Tensor) -> Tensor:
    return logprobs_NB[:, :-1].exp()


def _centred(values_NU: Tensor, named_NU: Tensor) -> Tensor:
    """Less their mean over the named tokens; 0 in an empty slot."""
    count_N1 = named_NU.sum(1, keepdim=True).clamp_min(1)
    mean_N1 = torch.where(named_NU, values_NU, 0.0).sum(1, keepdim=True) / count_N1
    return torch.where(named_NU, values_NU - mean_N1, 0.0)


def _differences(logprobs_NB: Tensor, named_NU: Tensor) -> Tensor:
    """[N, U, U]; 0 stands in for an empty slot, so that no infinity meets another."""
    filled_NU = logprobs_NB[:, :-1].where(named_NU, 0.0)
    return filled_NU[:, :, None] - filled_NU[:, None, :]


def _pairwise_l1(student_GU: Tensor, teacher_GU: Tensor, support_GU: Tensor) -> Tensor:
    """|p_i - q_j|_1 [G, G] of student row i and teacher row j: the tokens that both name, and all others as one."""
    same_GGUU = (support_GU[:, None, :, None] == support_GU[None, :, None, :]) & (support_GU >= 0)[:, None, :, None]
    both_GGU = same_GGUU.any(3)
    teacher_GGU = torch.einsum("ijuv,jv->iju", same_GGUU.to(teacher_GU.dtype), teacher_GU)
    student_GGU = student_GU[:, None, :] * both_GGU
    named = (student_GGU - teacher_GGU).abs().sum(2)
    return named + (student_GGU.sum(2) - teacher_GGU.sum(2)).abs()


def _transport_plan(cost_GG: Tensor, temperature: float, iterations: int) -> Tensor:
    """The plan [G, G] whose rows and columns sum to 1, by Sinkhorn's iterations in the log domain."""
    log_plan_GG = -cost_GG / temperature
    for _ in range(iterations):
        log_plan_GG = log_plan_GG.log_softmax(1)
        log_plan_GG = log_plan_GG.log_softmax(0)
    return log_plan_GG.exp()
