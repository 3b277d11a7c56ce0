"""Parts of gpu_check.py: the head's element-wise passes, torch's and the candidate in Triton, checked and timed."""
# N rows, V vocabulary, U support size, B = U + 1 buckets

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_errors import DTYPES, SLACK, Check, largest_difference, relative_error
from measure import clock
from opsd.ops.head.buffer import HeadBuffer
from opsd.ops.head.events import Events
from opsd.ops.head.form import PLAIN
from opsd.ops.head.whole_rows import buckets_of_logits, whole_gradient

STOP_IDS = (3, 11)
FOREIGN_ID = 5
NO_EVENTS = [STOP_IDS[1], FOREIGN_ID]  # what a support does not name
SMALL_VOCAB = 70  # where a row can name every event


@dataclass(frozen=True, kw_only=True)
class LogitCase:
    """A chunk between its product and the gradient's: random logits, and gradients of their buckets."""

    logits_NV: Tensor  # float32
    events: Events
    grad_NB: Tensor  # float32

    @classmethod
    def random(cls, device: str, *, rows: int, vocab: int, named: int) -> LogitCase:
        """Every fifth row has an empty slot, the second names nothing, every third the stop event."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        draw_NV = normal(rows, vocab)
        draw_NV[::3, STOP_IDS[0]] = math.inf
        draw_NV[:, NO_EVENTS] = -math.inf
        support_NU = draw_NV.topk(named, dim=1).indices
        support_NU[::5, -1] = -1
        support_NU[1] = -1
        is_full_N1 = (support_NU >= 0).sum(1, keepdim=True) == vocab - len(NO_EVENTS)
        impossible_NB = torch.cat([support_NU < 0, is_full_N1], dim=1)
        return cls(
            logits_NV=normal(rows, vocab).mul_(3.0),
            events=Events(support_NU, None, vocab, STOP_IDS, (FOREIGN_ID,)),
            grad_NB=normal(rows, named + 1).masked_fill_(impossible_NB, 0.0),
        )


class TorchPasses:
    """The product's own: `opsd.ops.head.whole_rows`."""

    def __init__(self, case: LogitCase, dtype: torch.dtype) -> None:
        """`dtype`: of the gradient."""
        self.case, self.dtype, self.columns = case, dtype, slice(0, case.events.vocab_size)
        self.buffer = HeadBuffer(
            case.logits_NV,
            vocab_size=case.events.vocab_size,
            dtype=torch.float32,
            needs_gradient=False,
            in_blocks=False,
        )

    def fill(self) -> None:
        """Puts the logits where a product would have left them: both passes work in place."""
        self.buffer.begin(len(self.case.logits_NV))
        self.logits_NV = self.buffer.put(self.columns).copy_(self.case.logits_NV)

    def forward(self) -> Tensor:
        """The log-probabilities [N, B] of the buckets."""
        self.chunk = buckets_of_logits(self.logits_NV, PLAIN, self.case.events, self.buffer)
        return self.chunk.logprobs_NB

    def backward(self) -> Tensor:
        """dL/dlogits [N, V]."""
        [(_, grad_NV)] = whole_gradient(self.chunk, self.case.events, self.case.grad_NB, None, dtype=self.dtype)
        self.buffer.drop()
        return grad_NV


class TritonPasses:
    """The candidate: `triton_head`."""

    def __init__(self, case: LogitCase, dtype: torch.dtype, block: int) -> None:
        import triton_head  # a machine without Triton has the other passes

        self.kernels = triton_head
        self.case, self.dtype, self.block = case, dtype, block
        self.logits_NV = torch.empty_like(case.logits_NV)

    def fill(self) -> None:
        self.logits_NV.copy_(self.case.logits_NV)

    def forward(self) -> Tensor:
        self.rows = self.kernels.triton_buckets(self.logits_NV, self.case.events, block=self.block)
        return self.rows.logprobs_NB

    def backward(self) -> Tensor:
        events, grad_NB = self.case.events, self.case.grad_NB
        return self.kernels.triton_gradient(self.rows, events, grad_NB, dtype=self.dtype, block=self.block)


def triton_passes(*, device: str, dtype: str, rows: int, vocab: int, named: int, block: int) -> list[Check]:
    """The candidate against float64, held to the error of torch's passes; `dtype`: of the gradient."""
    cases = {
        "": LogitCase.random(device, rows=rows, vocab=vocab, named=named),
        "rows that name everything: ": LogitCase.random(
            device, rows=16, vocab=SMALL_VOCAB, named=SMALL_VOCAB - len(NO_EVENTS)
        ),
    }
    checks = []
    for which, case in cases.items():
        kinds = TorchPasses(case, DTYPES[dtype]), TritonPasses(case, DTYPES[dtype], block)
        (plain_NB, plain_NV), (found_NB, found_NV) = (both_passes(passes) for passes in kinds)
        exact_NB, exact_NV = exact_passes(case)
        compared: list[tuple[str, Callable[[Tensor, Tensor], float], Tensor, Tensor, Tensor]] = [
            ("log-probabilities, nats", largest_difference, found_NB, plain_NB, exact_NB),
            ("gradient", relative_error, found_NV, plain_NV, exact_NV),
            ("gradient, largest error", largest_difference, found_NV, plain_NV, exact_NV),
        ]
        checks += [
            Check(what=which + what, error=error(own, truth), allowed=2.0 * error(other, truth) + SLACK[dtype])
            for what, error, own, other, truth in compared
        ]
    return checks


def both_passes(passes: TorchPasses | TritonPasses) -> tuple[Tensor, Tensor]:
    passes.fill()
    return passes.forward(), passes.backward()


def exact_passes(case: LogitCase) -> tuple[Tensor, Tensor]:
    """(log-probabilities [N, B], dL/dlogits [N, V]) in float64, each term by its definition."""
    events = case.events
    logits_NV, stops = case.logits_NV.double(), list(STOP_IDS)
    stop_NE = logits_NV[:, stops]
    logits_NV[:, NO_EVENTS] = -math.inf
    logits_NV[:, STOP_IDS[0]] = stop_NE.logsumexp(1)
    id_NU, is_empty_NU = events.support_NU.clamp_min(0), events.support_NU < 0
    named_NU = logits_NV.gather(1, id_NU).masked_fill(is_empty_NU, -math.inf)
    # One column more, for the empty slots.
    place_NU = events.support_NU.masked_fill(is_empty_NU, events.vocab_size)
    rest_NV = torch.nn.functional.pad(logits_NV, (0, 1)).scatter(1, place_NU, -math.inf)[:, :-1]
    rest_N1 = rest_NV.logsumexp(1, keepdim=True)
    grad_NV = (rest_NV - rest_N1).exp().masked_fill(rest_N1 == -math.inf, 0.0) * case.grad_NB[:, -1:]
    grad_NV.scatter_add_(1, id_NU, case.grad_NB[:, :-1].double())  # 0 of an empty slot
    grad_NV[:, stops] = grad_NV[:, STOP_IDS[:1]] * stop_NE.softmax(1)
    return torch.cat([named_NU, rest_N1], dim=1).log_softmax(1), grad_NV


def passes_speed(
    *, device: str, dtype: str, rows: int, vocab: int, named: int, block: int | None, repeats: int
) -> dict[str, float]:
    """Median milliseconds of each pass; `block` None: torch's, else the candidate's with so many columns at a time."""
    case = LogitCase.random(device, rows=rows, vocab=vocab, named=named)
    passes = TorchPasses(case, DTYPES[dtype]) if block is None else TritonPasses(case, DTYPES[dtype], block)
    forward_s, backward_s = [], []
    for _ in range(repeats + 1):  # the first compiles
        passes.fill()
        start = clock(device)
        passes.forward()
        middle = clock(device)
        passes.backward()
        forward_s.append(middle - start)
        backward_s.append(clock(device) - middle)
    forward_ms, backward_ms = (statistics.median(seconds[1:]) * 1e3 for seconds in (forward_s, backward_s))
    return {"forward_ms": forward_ms, "backward_ms": backward_ms}
