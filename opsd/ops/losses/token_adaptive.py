"""Divergences that weigh forward against reverse KL by what the two models say at a token.

Signature, units and edges are those of divergences.py, where these are registered. What is called detached
counts as a constant in the gradient, so a numerical derivative of the value is not the gradient. "Top-k" in a
docstring: what the value means when the teacher names some tokens only and all others share one rest bucket.
Source: docs/losses.md, Token-adaptive divergences.
"""
# N tokens, B buckets

from __future__ import annotations

import math

from torch import Tensor

from opsd.ops.losses.kl import check_shapes, kl, kl_terms


def todi(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> Tensor:
    """Each bucket takes its term of the forward KL where the student is below the teacher, of the reverse KL above.

    sum_b w_b q_b log(q_b / p_b) + (1 - w_b) p_b log(p_b / q_b), student p, teacher q, w = q / (q + p) detached. The
    value is forward KL + reverse KL exactly; only the gradient knows of the weights.
    Top-k: a lower bound; the tokens of the rest share one weight, that of their masses.
    Source: ToDi, arXiv 2505.16297.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    impossible_NB = (student_logprobs_NB == -math.inf) & (teacher_logprobs_NB == -math.inf)
    log_ratio_NB = (teacher_logprobs_NB - student_logprobs_NB).detach().masked_fill(impossible_NB, 0.0)
    weight_NB = log_ratio_NB.sigmoid()
    forward_NB = kl_terms(teacher_logprobs_NB, student_logprobs_NB)
    reverse_NB = kl_terms(student_logprobs_NB, teacher_logprobs_NB)
    return (weight_NB * forward_NB + (1.0 - weight_NB) * reverse_NB).sum(-1)


def akl(
    student_logprobs_NB: Tensor,
    teacher_logprobs_NB: Tensor,
    *,
    head_mass: float = 0.5,
    crossing: str = "head",
    head_share_N: Tensor | None = None,
) -> Tensor:
    """The forward KL as far as the models differ in the teacher's head, the reverse KL as far as in its tail.

    share * KL(q || p) + (1 - share) * KL(p || q), the share being `head_share`; 0 where the models are equal.
    `head_share_N`: that of whole rows, where the buckets are some columns of them; None: of these buckets.
    Top-k: no bound of the dense value. The rest is placed by its whole mass, so it is head where that is large, though
    each of its tokens alone may belong to the tail; and gaps that cancel within it are not seen.
    Source: AKL, arXiv 2404.02657.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    if head_share_N is None:
        head_share_N = head_share(student_logprobs_NB, teacher_logprobs_NB, head_mass=head_mass, crossing=crossing)
    forward_N, reverse_N = kl(teacher_logprobs_NB, student_logprobs_NB), kl(student_logprobs_NB, teacher_logprobs_NB)
    return head_share_N * forward_N + (1.0 - head_share_N) * reverse_N


def head_share(
    student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, head_mass: float = 0.5, crossing: str = "head"
) -> Tensor:
    """g_head / (g_head + g_tail) [N], with g = sum |q - p| over head and tail, detached; 0 where both are 0.

    `crossing` says where the bucket goes with which the cumulative teacher mass crosses:
    "head": buckets in ascending order are tail while their cumulative mass is at most 1 - `head_mass`. As
    songmzhang/DSKD (its `<` differs only where the mass meets the bound exactly) and jungseongryong/ToDi,
    code/criterions/various_divergence.py of both.
    "tail": buckets in descending order are head while their cumulative mass is at most `head_mass`, and the first
    always. The authors' own wutaiqiang/LLM_KD_AKL, AKL.py; so too SassyRong/AdaKD, loss/losses.py.
    """
    if not 0.0 < head_mass < 1.0:
        raise ValueError(f"head_mass must be in (0, 1), got {head_mass}")
    if crossing not in ("head", "tail"):
        raise ValueError(f"crossing must be one of head, tail, got {crossing!r}")
    teacher_NB = teacher_logprobs_NB.detach().double().exp()
    gap_NB = (teacher_NB - student_logprobs_NB.detach().double().exp()).abs()
    sorted_NB, order_NB = teacher_NB.sort(dim=-1, stable=True, descending=crossing == "tail")
    if crossing == "head":
        in_head_NB = sorted_NB.cumsum(-1) > 1.0 - head_mass
    else:
        in_head_NB = sorted_NB.cumsum(-1) <= head_mass
        in_head_NB[..., 0] = True
    # The last of a cumulative sum: like it, and unlike sum, the same to the last bit with empty buckets in front.
    gap_NB = gap_NB.gather(-1, order_NB)
    head_N = (gap_NB * in_head_NB).cumsum(-1)[..., -1]
    tail_N = (gap_NB * ~in_head_NB).cumsum(-1)[..., -1]
    differ_N = head_N + tail_N > 0.0
    return (head_N / (head_N + tail_N)).masked_fill(~differ_N, 0.0).to(student_logprobs_NB.dtype)


def abkd(student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """The alpha-beta divergence of the teacher q from the student p, with s = alpha + beta:

    -1 / (alpha beta) sum_b [q_b^alpha p_b^beta - (alpha / s) q_b^s - (beta / s) p_b^s]. It tends to the forward KL for
    (1, 0) and to the reverse KL for (0, 1), which are entries of their own; so both must be > 0, else ValueError.
    Finite also where only one side has mass.
    Top-k: a lower bound where alpha + beta = 1. Otherwise powers of summed masses are not sums of powers, and no bound
    holds in general: at alpha = beta = 1 the rest can add more than its tokens would.
    Source: ABKD, arXiv 2505.04560.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    if not (0.0 < alpha < math.inf and 0.0 < beta < math.inf):
        raise ValueError(
            f"alpha and beta must be > 0, got {alpha} and {beta}; their limits (1, 0) and (0, 1) are the divergences "
            "forward_kl and reverse_kl"
        )
    total = alpha + beta
    cross_NB = (alpha * teacher_logprobs_NB + beta * student_logprobs_NB).exp()
    own_NB = alpha / total * (total * teacher_logprobs_NB).exp() + beta / total * (total * student_logprobs_NB).exp()
    return (own_NB - cross_NB).sum(-1) / (alpha * beta)


def entropy_aware(
    student_logprobs_NB: Tensor,
    teacher_logprobs_NB: Tensor,
    *,
    threshold: float = 0.8,
    is_unsure_N: Tensor | None = None,
) -> Tensor:
    """KL(student || teacher), plus KL(teacher || student) where the teacher's entropy is above `threshold` nats.

    `is_unsure_N`: where it is so in whole rows (bool), if the buckets are some columns of them; None: in these buckets.
    Top-k: a lower bound; the entropy of the buckets is one too, so the forward KL joins in at fewer tokens.
    Source: entropy-aware OPD, arXiv 2603.07079.
    """
    check_shapes(student_logprobs_NB, teacher_logprobs_NB)
    if is_unsure_N is None:
        is_unsure_N = is_unsure(student_logprobs_NB, teacher_logprobs_NB, threshold=threshold)
    forward_N = kl(teacher_logprobs_NB, student_logprobs_NB)
    return kl(student_logprobs_NB, teacher_logprobs_NB) + forward_N.where(is_unsure_N, 0.0)


def is_unsure(_student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, threshold: float = 0.8) -> Tensor:
    """Whether the teacher's entropy is above `threshold` nats, bool [N]."""
    teacher_NB = teacher_logprobs_NB.detach()
    entropy_N = -(teacher_NB.exp() * teacher_NB.masked_fill(teacher_NB == -math.inf, 0.0)).sum(-1)
    return entropy_N > threshold
