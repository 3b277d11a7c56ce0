"""Parts of gpu_check.py that must hold: the output head against dense computations of the same."""
# N rows, D width, V vocabulary, U support size, B = U + 1 buckets

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_errors import DTYPES, SLACK, Check, largest_difference, relative_error
from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.losses.divergences import DIVERGENCES, reverse_kl

STOP_IDS = (3, 11)
PADDING = 7  # rows of the head that are no tokens
PARTS = ("value", "grad hidden", "grad weight")  # of a loss
EXACT = 1e-3  # nats; a logit near 20 that is rounded to bfloat16 errs by up to 0.06


Results = tuple[Tensor, ...]  # what PARTS names: divergence [N], gradients of hidden and weight


@dataclass(frozen=True, kw_only=True)
class HeadCase:
    """Random inputs of the head with two stop ids, an empty slot, padding and temperatures."""

    hidden_ND: Tensor
    weight_VD: Tensor
    support_NU: Tensor
    teacher_logprobs_NB: Tensor
    weight_N: Tensor
    temperature_N: Tensor

    @classmethod
    def random(
        cls, device: str, dtype: str, *, rows: int, vocab: int, width: int, named: int, seed: int = 0
    ) -> HeadCase:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        draw_NV = normal(rows, vocab - PADDING)
        draw_NV[:, STOP_IDS[1]] = -math.inf  # the event goes by the name of the first
        support_NU = draw_NV.topk(named, dim=1).indices
        support_NU[::5, -1] = -1
        teacher_NB = (2.0 * normal(rows, named + 1)).masked_fill(
            torch.cat([support_NU < 0, torch.zeros_like(support_NU[:, :1], dtype=torch.bool)], dim=1), -math.inf
        )
        return cls(
            hidden_ND=normal(rows, width).to(DTYPES[dtype]),
            weight_VD=normal(vocab, width).mul_(3.0 * width**-0.5).to(DTYPES[dtype]),
            support_NU=support_NU,
            teacher_logprobs_NB=teacher_NB.log_softmax(1),
            weight_N=normal(rows).abs_(),
            temperature_N=normal(rows).sigmoid_() + 0.5,
        )

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return tuple(x.detach().to(dtype or x.dtype).requires_grad_() for x in (self.hidden_ND, self.weight_VD))

    @property
    def events(self) -> dict[str, Any]:
        num_tokens = len(self.weight_VD) - PADDING
        return {"temperature_N": self.temperature_N, "vocab_size": num_tokens, "stop_ids": STOP_IDS}


def head(*, device: str, dtype: str, rows: int, vocab: int, width: int, named: int) -> list[Check]:
    """Values and gradients of the sparse loss, and of its buckets, against dense float64 on the same rounded inputs."""
    case = HeadCase.random(device, dtype, rows=rows, vocab=vocab, width=width, named=named)
    return [
        *bucket_checks(case, dtype),
        *loss_checks(dtype, rows, partial(sparse_loss, case), partial(dense_loss, case)),
    ]


def loss_checks(dtype: str, rows: int, loss: Callable[..., Results], dense: Callable[..., Results]) -> list[Check]:
    """Of a head's loss(divergence, chunk_rows), in chunks of two sizes, against dense(divergence, dtype) in float64."""
    checks = []
    for name in ("reverse_kl", "forward_kl", "jsd"):
        exact, plain = (dense(DIVERGENCES[name], kind) for kind in (torch.float64, DTYPES[dtype]))
        for chunk_rows in (None, 1 + rows // 3):
            parts = zip(PARTS, loss(DIVERGENCES[name], chunk_rows), plain, exact, strict=True)
            checks += [
                Check(
                    what=f"{name}, {'its own chunks' if chunk_rows is None else 'three chunks'}: {part}",
                    error=relative_error(own, truth),
                    allowed=2.0 * relative_error(other, truth) + SLACK[dtype],
                )
                for part, own, other, truth in parts
            ]
    return checks


def head_exactness(*, device: str, dtype: str, rows: int, vocab: int, width: int, named: int) -> list[Check]:
    """Logits up to 20: they must reach the softmax in float32, whatever dtype they are made from."""
    case = HeadCase.random(device, dtype, rows=rows, vocab=vocab, width=width, named=named)
    logits_NV = case.hidden_ND.double() @ case.weight_VD.double().T
    case.hidden_ND.mul_(20.0 / logits_NV.abs().amax(1, keepdim=True))
    case.temperature_N.fill_(1.0)
    exact_NB, exact_N = dense_buckets(case, *case.leaves(torch.float64))
    found_NB, found_N = bucket_logprobs(*case.leaves(), case.support_NU, **case.events)
    value, *gradients = sparse_loss(case, reverse_kl, None)
    exact_value, *exact_gradients = dense_loss(case, reverse_kl, torch.float64)
    rounding = torch.finfo(DTYPES[dtype]).eps  # of a gradient that is stored in this dtype
    pairs = zip(("grad hidden", "grad weight"), gradients, exact_gradients, strict=True)
    return [
        Check(what="log-probabilities, nats", error=largest_difference(found_NB, exact_NB), allowed=EXACT),
        Check(what="entropy, nats", error=largest_difference(found_N, exact_N), allowed=EXACT),
        Check(what="reverse KL, nats", error=largest_difference(value, exact_value), allowed=EXACT),
        *(Check(what=w, error=relative_error(own, truth), allowed=rounding + EXACT) for w, own, truth in pairs),
    ]


def bucket_checks(case: HeadCase, dtype: str) -> list[Check]:
    exact, plain = (dense_buckets(case, *case.leaves(kind)) for kind in (torch.float64, DTYPES[dtype]))
    found = bucket_logprobs(*case.leaves(), case.support_NU, **case.events)
    return [
        Check(
            what=f"{part}, nats",
            error=largest_difference(own, truth),
            allowed=2.0 * largest_difference(other, truth) + SLACK[dtype],
        )
        for part, own, other, truth in zip(("log-probabilities", "entropy"), found, plain, exact, strict=True)
    ]


def sparse_loss(case: HeadCase, divergence: Callable[..., Tensor], chunk_rows: int | None) -> Results:
    hidden_ND, weight_VD = case.leaves()
    loss, value_N = sparse_head_loss(
        hidden_ND,
        weight_VD,
        case.support_NU,
        case.teacher_logprobs_NB,
        case.weight_N,
        divergence,
        chunk_rows=chunk_rows,
        **case.events,
    )
    loss.backward()
    return value_N, hidden_ND.grad, weight_VD.grad


def dense_loss(case: HeadCase, divergence: Callable[..., Tensor], dtype: torch.dtype) -> Results:
    """(divergence [N], gradient of hidden, gradient of weight) by autograd through all logits."""
    hidden_ND, weight_VD = case.leaves(dtype)
    student_NB, _ = dense_buckets(case, hidden_ND, weight_VD)
    teacher_NB = tempered_teacher(case, dense_events(case, hidden_ND, weight_VD))
    value_N = divergence(student_NB.double(), teacher_NB.double())
    (case.weight_N * value_N).sum().backward()
    return value_N.detach(), hidden_ND.grad, weight_VD.grad


def dense_buckets(case: HeadCase, hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """What bucket_logprobs returns: log-probabilities [N, B] and the entropy over events, at the rows' temperatures."""
    events_NV = dense_events(case, hidden_ND, weight_VD)
    events_NV = (events_NV / case.temperature_N[:, None].to(events_NV.dtype)).log_softmax(1)
    named_NU = events_NV.gather(1, case.support_NU.clamp_min(0)).masked_fill(case.support_NU < 0, -math.inf)
    rest_N1 = rest_of(case, events_NV).logsumexp(1, keepdim=True)
    entropy_N = -(events_NV.exp() * events_NV.masked_fill(events_NV == -math.inf, 0.0)).sum(1)
    return torch.cat([named_NU, rest_N1], dim=1), entropy_N


def dense_events(case: HeadCase, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """log-probabilities [N, V] at temperature 1, all stop mass at the first stop id; from all logits at once."""
    num_tokens = len(weight_VD) - PADDING
    kind = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    logprobs_NV = (hidden_ND @ weight_VD[:num_tokens].T).to(kind).log_softmax(1)
    stops = torch.tensor(STOP_IDS, device=logprobs_NV.device)
    event_N = logprobs_NV[:, stops].logsumexp(1)
    return logprobs_NV.index_copy(1, stops, torch.stack([event_N, torch.full_like(event_N, -math.inf)], dim=1))


def rest_of(case: HeadCase, events_NV: Tensor) -> Tensor:
    """The events that no row's support names; the others are -inf."""
    num_tokens = events_NV.shape[1]
    is_named_NV = torch.zeros(len(events_NV), num_tokens + 1, dtype=torch.bool, device=events_NV.device)
    is_named_NV.scatter_(1, case.support_NU.masked_fill(case.support_NU < 0, num_tokens), True)
    return events_NV.masked_fill(is_named_NV[:, :-1], -math.inf)


def tempered_teacher(case: HeadCase, events_NV: Tensor) -> Tensor:
    """The teacher's buckets at the rows' temperatures, its rest in the shape of the student's (`events_NV`, at 1)."""
    power_N1 = case.temperature_N[:, None].to(events_NV.dtype)
    shape_NV = rest_of(case, events_NV.detach()).log_softmax(1)
    teacher_NB = case.teacher_logprobs_NB.to(events_NV.dtype)
    rest_N1 = ((teacher_NB[:, -1:] + shape_NV) / power_N1).logsumexp(1, keepdim=True)
    return torch.cat([teacher_NB[:, :-1] / power_N1, rest_N1], dim=1).log_softmax(1)
