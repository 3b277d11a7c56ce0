"""Losses that are added to a divergence with a weight: `loss.terms={pearson: {weight: 0.1}}`.

The arguments are those of a divergence (divergences.py), and the result is [N]. All compare the named tokens only and
are blind to how much mass the rest has, so none of them is a divergence: they stand beside one. Their entries are in
table.py. Source: docs/losses.md, Terms beside a divergence.
"""
# N rows, B buckets, U = B - 1 named tokens, G rows of a group

from __future__ import annotations

import torch
from torch import Tensor

MOST_ITERATIONS = 10_000  # of Sinkhorn's: the plan has long settled, and a mistyped number would hang the start


def pearson(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """1 - Pearson correlation of both models' probabilities on the named tokens, in [0, 2].

    However small the mass that they have: a correlation does not change with the scale of a side. 1, with a finite
    gradient, where a row names fewer than two tokens or a side is constant.
    Source: the value term of R2KD, arXiv 2311.13934. Left out: its rank term, which has no gradient, and the pruning of
    the teacher.
    """
    named_NU = _named(teacher_logprobs_NB)
    student_NU = _standardised(student_logprobs_NB, named_NU)
    teacher_NU = _standardised(teacher_logprobs_NB.to(student_NU.dtype), named_NU)
    return 1.0 - (student_NU * teacher_NU).sum(1)


def kendall(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, sharpness: float = 1.0) -> Tensor:
    """1 - Kendall's tau of both models' orders of the tokens, in [0, 2]; 1 where a row has no pair.

    The sign of a pair is tanh(sharpness * difference of log-probabilities) for either model, so that it has a gradient
    and a pair that the teacher hardly tells apart counts little. The value of equal models therefore is not 0, nor the
    lowest: a student whose order is right and steeper pays less. Raises ValueError unless `sharpness` > 0.
    Source: RKKD, arXiv 2409.17823.
    """
    if not sharpness > 0:
        raise ValueError(f"sharpness must be > 0, got {sharpness}")
    named_NU = _named(teacher_logprobs_NB)
    pair_NUU = (named_NU[:, :, None] & named_NU[:, None, :]).triu(1)
    order_NUU = torch.tanh(sharpness * _differences(teacher_logprobs_NB, named_NU))
    soft_NUU = torch.tanh(sharpness * _differences(student_logprobs_NB, named_NU))
    agreement_N = (soft_NUU * order_NUU * pair_NUU).sum((1, 2))
    return 1.0 - agreement_N / pair_NUU.sum((1, 2)).clamp_min(1)


def sinkhorn(
    student_logprobs_NB: Tensor,
    teacher_logprobs_NB: Tensor,
    *,
    support_NU: Tensor,
    group_rows: int = 32,
    logit_temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Tensor:
    """Cost of moving the student's rows to the teacher's rows of other positions: G sum_j P_ij W_ij, W = |p_i - q_j|_1.

    G is the number of rows in a group of neighbouring rows. So the mean over the rows of a group, which the learner
    takes, is the sum of P W that the authors weigh by 8e-4. A row's value depends on which rows are packed beside it.
    p and q are softmax(logits / `logit_temperature`). P is what `iterations` of Sinkhorn make of exp(-W / `epsilon`),
    rows first, then columns, and the gradient goes through them: W alone at a constant P would be another gradient, as
    the envelope theorem holds for <P, W> - epsilon * entropy(P), which is not what is minimised.
    Top-k: two rows are compared on the tokens that both name, and the mass of all others at once, a lower bound of the
    cost; at a temperature the rest counts as one token. Raises ValueError for an option out of range.
    Source: SinKD, arXiv 2402.17110, and its authors' code, 2018cx/SinKD, GPT-Neo/lossd.py (T 2, epsilon 0.1, 20
    iterations, 0.0008 times the sum).
    """
    for name, value in (("group_rows", group_rows), ("logit_temperature", logit_temperature), ("epsilon", epsilon)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    if not 1 <= iterations <= MOST_ITERATIONS:
        raise ValueError(f"iterations must be in [1, {MOST_ITERATIONS}], got {iterations}")
    student_NB = (student_logprobs_NB / logit_temperature).log_softmax(1)
    teacher_NB = (teacher_logprobs_NB / logit_temperature).log_softmax(1)
    parts = []
    for student_GB, teacher_GB, support_GU in zip(
        student_NB.split(group_rows), teacher_NB.split(group_rows), support_NU.split(group_rows), strict=True
    ):
        cost_GG = _pairwise_l1(_probs(student_GB), _probs(teacher_GB).to(student_GB.dtype), support_GU)
        plan_GG = _transport_plan(cost_GG, epsilon, iterations)
        parts.append(len(cost_GG) * (plan_GG * cost_GG).sum(1))
    return torch.cat(parts) if parts else student_logprobs_NB.sum(1)


def dac_kl(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, low: float = 0.5, high: float = 1.0) -> Tensor:
    """Forward KL among the tokens whose teacher's probability lies between two quantiles of the row, renormalised.

    A row with fewer than two tokens there adds 0. Simplified from DAC-KL, arXiv 2407.10068: the paper learns the
    quantiles with a network of its own, here they are options; its sequence correction and span terms are left out.
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


def _named(teacher_logprobs_NB: Tensor) -> Tensor:
    """bool [N, U]: slots that hold a token."""
    return ~teacher_logprobs_NB[:, :-1].isneginf()


def _probs(logprobs_NB: Tensor) -> Tensor:
    return logprobs_NB[:, :-1].exp()


def _standardised(logprobs_NB: Tensor, named_NU: Tensor) -> Tensor:
    """The probabilities of the named tokens less their mean, divided by the 2-norm of what is left: [N, U].

    0 in an empty slot, and everywhere where there is no more than one value. The largest probability stands for 1
    first, so that none underflows and equal ones are equal to the last bit.
    """
    named_logprobs_NU = logprobs_NB[:, :-1].masked_fill(~named_NU, -torch.inf)
    largest_N1 = named_logprobs_NU.detach().amax(1, keepdim=True).nan_to_num(neginf=0.0)
    values_NU = (named_logprobs_NU - largest_N1).exp()
    mean_N1 = values_NU.sum(1, keepdim=True) / named_NU.sum(1, keepdim=True).clamp_min(1)
    centred_NU = (values_NU - mean_N1).masked_fill(~named_NU, 0.0)
    square_N1 = centred_NU.square().sum(1, keepdim=True)
    # A root has no gradient at 0: there it is taken of 1.
    return centred_NU / square_N1.where(square_N1 > 0.0, 1.0).sqrt()


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


def _transport_plan(cost_GG: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The plan [G, G] whose rows and columns sum to 1, by Sinkhorn's iterations in the log domain."""
    log_plan_GG = -cost_GG / epsilon
    for _ in range(iterations):
        log_plan_GG = log_plan_GG.log_softmax(1)
        log_plan_GG = log_plan_GG.log_softmax(0)
    return log_plan_GG.exp()
