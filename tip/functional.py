"""Token importance for a trainer of your own: plain functions on the logits of two models, and nothing else to set up.

    student_logits = student(ids[:, :-1]).logits                # the rows of student(ids).logits[:, :-1]
    with torch.no_grad():
        teacher_logits = teacher(ids[:, :-1]).logits
    mask = response_mask[:, 1:]                                 # row t scores token t + 1

    stats = token_stats(student_logits, teacher_logits, mask)
    selection = SELECTORS["top_ratio"](SCORES["soft_or"](stats), mask.sum(1), ratio=0.2)
    importance = importance_from_selection(selection, mask, normalise=True)
    weighted_distillation_loss(student_logits, teacher_logits, importance, mask_BT=mask).backward()

The shift is the caller's: row t of the logits must score the token that place t of the mask stands for. (ids[:, :-1] as
input saves the buffer with which the backward of a sliced tensor pads it again.) Both models have one vocabulary (cut a
padded one first), and every id is an event of its own: where the two models end an answer with different ids, move both
to one of them first. A place that the mask leaves out may hold anything.
Everything goes through the rows in chunks, so besides the logits given, only their gradient is of size [B, T, V].
`recipes/examples/` holds a whole loop in plain PyTorch, and a subclass of TRL's trainer.
"""
# B sequences, T tokens of each, V vocabulary, N rows of a chunk

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.ops.align import NUM_COMPATIBLE
from opsd.ops.head.gradients import softmax_dtype
from opsd.ops.losses.divergences import DIVERGENCES, forward_kl, reverse_kl
from opsd.ops.signals import STATISTICS, statistics_of
from opsd.types import Selection, TokenStats

# The float32 logits of one model in a chunk (27 rows of a 152k vocabulary); about ten such buffers live at a time.
CHUNK_BYTES = 16 << 20


@torch.no_grad()
def token_stats(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, mask_BT: Tensor) -> TokenStats:
    """What the scores need of each token where `mask_BT` is true, sequence after sequence. On CPU, for the selectors.

    Entropy as a share of log V, the two KLs in nats and all else that is a function of the two distributions, every
    entry of `opsd.ops.signals.STATISTICS` included, exact and at temperature 1, in float32 (float64 for float64
    logits). `mask_BT.sum(1)` are the lengths that belong to them.
    Raises ValueError where a shape does not fit.
    """
    _check_shapes(student_logits_BTV, teacher_logits_BTV, mask_BT=mask_BT)
    place_N2, vocab_size = mask_BT.nonzero(), student_logits_BTV.shape[-1]
    # Filled in place: results kept of every chunk would lie among the freed ones and hold the heap's pages.
    entropy_N, reverse_N, forward_N, compatibility_N, teacher_entropy_N, *further = student_logits_BTV.new_empty(
        5 + len(STATISTICS), len(place_N2), dtype=softmax_dtype(student_logits_BTV)
    )
    extra = dict(zip(STATISTICS, further, strict=True))
    ids_V = torch.arange(vocab_size, device=student_logits_BTV.device)
    num_compatible = min(NUM_COMPATIBLE, vocab_size)
    for rows, place in _chunks(place_N2, vocab_size):
        student_NV = _logprobs(student_logits_BTV[place], 1.0)
        teacher_NV = _logprobs(teacher_logits_BTV[place], 1.0)
        entropy_N[rows] = torch.special.entr(student_NV.exp()).sum(-1) / math.log(vocab_size)
        reverse_N[rows] = reverse_kl(student_NV, teacher_NV)
        forward_N[rows] = forward_kl(student_NV, teacher_NV)
        for name, value_N in statistics_of(STATISTICS, student_NV, teacher_NV, ids_V.expand_as(student_NV)).items():
            extra[name][rows] = value_N
        likeliest_NC = student_NV.topk(num_compatible, dim=-1).indices
        compatibility_N[rows] = teacher_NV.gather(-1, likeliest_NC).exp().sum(-1)
        teacher_entropy_N[rows] = torch.special.entr(teacher_NV.exp()).sum(-1) / math.log(vocab_size)
    # Rounding can leave the range by a hair.
    return TokenStats(
        entropy_T=entropy_N.clamp(0.0, 1.0),
        reverse_kl_T=reverse_N.clamp_min(0.0),
        forward_kl_T=forward_N.clamp_min(0.0),
        compatibility_T=compatibility_N.clamp_max(1.0),
        teacher_entropy_T=teacher_entropy_N.clamp(0.0, 1.0),
        named_mass_T=torch.ones_like(entropy_N),  # every token has a bucket of its own
        extra=extra,
    ).to("cpu")


def importance_from_selection(selection: Selection, mask_BT: Tensor, *, normalise: bool = False) -> Tensor:
    """The selection's weights at their places, 0 elsewhere: float32 [B, T] on the mask's device.

    `mask_BT` is the one that the statistics were made with. The weights are relative to each other, so as they stand
    (weight 1 for each kept token) `weighted_distillation_loss` is the share of kept tokens times the mean over them.
    `normalise` scales the weights to mean 1 over the valid tokens. The loss then is the weighted mean over the kept
    tokens, as `opsd`'s learner has it, and the learning rate need not follow the ratio.
    Raises ValueError where the selection reaches beyond the mask.
    """
    place_T2 = mask_BT.nonzero()
    if len(selection) and int(selection.index_N.max()) >= len(place_T2):
        raise ValueError(
            f"selection must index the {len(place_T2)} tokens of mask_BT, got index {int(selection.index_N.max())}"
        )
    weight_N = selection.weight_N.to(mask_BT.device, torch.float32)
    if normalise:
        weight_N = weight_N * (len(place_T2) / weight_N.sum())
    importance_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
    importance_BT[place_T2[selection.index_N.to(mask_BT.device)].unbind(1)] = weight_N
    return importance_BT


def weighted_distillation_loss(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    importance_BT: Tensor,
    *,
    mask_BT: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str | Callable[[Tensor, Tensor], Tensor] = "forward_kl",
) -> Tensor:
    """The mean over the valid tokens of importance * divergence(student, teacher), in nats. With forward KL it is

        kl = F.kl_div(log_softmax(student / temperature), softmax(teacher / temperature), reduction="none").sum(-1)
        loss = (importance * kl)[mask].mean()

    Returns a scalar in float32 (float64 for float64 logits), differentiable once in the student's logits only; backward
    computes a chunk's softmax anew and forms the gradient in the logits' dtype.
    `importance_BT`: any real or boolean dtype. A token of importance 0 counts in the mean but costs nothing.
    `mask_BT`: true for a valid token; None: all are. Without a valid token, loss and gradient are 0.
    `temperature`: > 0, divides the logits of both models. The loss is not multiplied by temperature**2.
    `divergence`: a name in `opsd.ops.divergences.DIVERGENCES`, or a function of student and teacher log-probabilities
    [N, V] (each token its own bucket, no rest) that returns [N] nats, each from its own row alone.
    For one mean over micro-batches or ranks, multiply by the share of the valid tokens that this call holds.
    Raises ValueError for an unknown name, a temperature out of range, and where a shape does not fit.
    """
    mask_BT = torch.ones_like(importance_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
    _check_shapes(student_logits_BTV, teacher_logits_BTV, importance_BT=importance_BT, mask_BT=mask_BT)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    weight_BT = importance_BT.detach().to(softmax_dtype(student_logits_BTV)) / mask_BT.sum()
    place_N2 = (mask_BT & (weight_BT != 0)).nonzero()
    weight_N = weight_BT[place_N2.unbind(1)]
    of_rows = partial(_row_divergence, temperature=temperature, divergence=_divergence(divergence))
    return _WeightedSum.apply(student_logits_BTV, teacher_logits_BTV, weight_N, place_N2, of_rows)


class _WeightedSum(torch.autograd.Function):
    """sum of weight * divergence over the places given; the student's gradient is the only large tensor made."""

    @staticmethod
    def forward(ctx, student_logits_BTV, teacher_logits_BTV, weight_N, place_N2, divergence):
        ctx.save_for_backward(student_logits_BTV, teacher_logits_BTV, weight_N, place_N2)
        ctx.divergence = divergence
        total = weight_N.new_zeros(())
        for rows, place in _chunks(place_N2, student_logits_BTV.shape[-1]):
            value_N = divergence(student_logits_BTV[place], teacher_logits_BTV[place])
            total += (weight_N[rows] * value_N).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        student_logits_BTV, teacher_logits_BTV, weight_N, place_N2 = ctx.saved_tensors
        grad_BTV = torch.zeros_like(student_logits_BTV)
        for rows, place in _chunks(place_N2, student_logits_BTV.shape[-1]):
            student_NV = student_logits_BTV[place].requires_grad_()
            teacher_NV = teacher_logits_BTV[place]
            with torch.enable_grad():
                value_N = ctx.divergence(student_NV, teacher_NV)
            grad_value_N = (weight_N[rows] * grad_total).to(value_N.dtype)
            (grad_BTV[place],) = torch.autograd.grad(value_N, student_NV, grad_value_N)
        return grad_BTV, None, None, None, None


def _row_divergence(
    student_NV: Tensor, teacher_NV: Tensor, *, temperature: float, divergence: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The divergence of logits, [N] nats."""
    value_N = divergence(_logprobs(student_NV, temperature), _logprobs(teacher_NV, temperature))
    if value_N.shape != (len(student_NV),):
        raise ValueError(f"divergence must return shape ({len(student_NV)},), got {tuple(value_N.shape)}")
    return value_N


def _logprobs(logits_NV: Tensor, temperature: float) -> Tensor:
    return (logits_NV.to(softmax_dtype(logits_NV)) / temperature).log_softmax(-1)


def _chunks(place_N2: Tensor, vocab_size: int) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """The places (sequence, token) some at a time: which rows of `place_N2`, and they as an index into the logits.

    Such an index copies the chunk alone, where a reshape of sliced logits would copy them all.
    """
    chunk_rows = max(1, CHUNK_BYTES // (4 * vocab_size))
    for start in range(0, len(place_N2), chunk_rows):
        rows = slice(start, start + chunk_rows)
        yield rows, place_N2[rows].unbind(1)


def _divergence(given: str | Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    if callable(given):
        return given
    if given not in DIVERGENCES:
        raise ValueError(f"divergence must be a function or one of {', '.join(DIVERGENCES)}, got {given!r}")
    return DIVERGENCES[given]


def _check_shapes(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, **of_tokens_BT: Tensor) -> None:
    if student_logits_BTV.ndim != 3:
        raise ValueError(f"student_logits_BTV must have shape (B, T, V), got {tuple(student_logits_BTV.shape)}")
    _expect_shape("teacher_logits_BTV", teacher_logits_BTV, student_logits_BTV.shape)
    for name, tensor in of_tokens_BT.items():
        _expect_shape(name, tensor, student_logits_BTV.shape[:2])


def _expect_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
