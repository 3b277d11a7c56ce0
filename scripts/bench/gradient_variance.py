"""How noisy the gradient of the reverse KL is over draws of the sampled token, by estimator: exact, in closed form.

At one row the hidden state's gradient is g(y) = a_y e_y + b_y m + c_y t + d, with the drawn token's column e_y of the
head, the mean column m, the sum t over the tail and a constant d. Its mean over y and the trace of its covariance are
sums over the vocabulary, so nothing is drawn here. float64. Source: docs/methods.md, Gradient variance.
"""
# V events, D width, S events of the support

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ESTIMATORS = ("sampled", "coarse", "residual", "exact")


class Row(NamedTuple):
    """One row of both models over events; an event without probability (-inf) is none."""

    student_V: Tensor  # log-probabilities, nats
    teacher_V: Tensor
    in_support_V: Tensor  # bool, without a look at the sampled token
    columns_VD: Tensor  # gradient of each event's logit in the hidden state: the head's rows
    stop_ids: tuple[int, ...] = ()  # one event, at the first of them; its column is made of theirs
    stop_shares: Tensor | None = None  # of these ids within the event, sums to 1


class Noise(NamedTuple):
    trace: float  # of the covariance over draws y of the student
    mean_D: Tensor  # over the same draws


class _Gradients(NamedTuple):
    """g(y) = own_V e_y + mean_V m + tail_V t + constant_D for every y."""

    own_V: Tensor
    mean_V: Tensor
    tail_V: Tensor
    constant_D: Tensor


class _Directions(NamedTuple):
    """m and t, and their products with every column."""

    vectors_2D: Tensor
    dots_V2: Tensor


def noise_of(row: Row) -> dict[str, Noise]:
    """By estimator: sampled, r_y grad log p_y; coarse, of the support, y and a rest; residual; exact, without noise."""
    probs_V = row.student_V.exp()
    ratio_V = (row.student_V - row.teacher_V).masked_fill(probs_V == 0.0, 0.0)
    columns = _Columns(row)
    outside_V = ~row.in_support_V & (probs_V > 0.0)
    mean_D = columns.total(probs_V)
    tail_D = columns.total(probs_V * outside_V)
    nothing_D = torch.zeros_like(mean_D)
    exact_D = columns.total(probs_V * ratio_V) - (probs_V * ratio_V).sum() * mean_D
    inside_V = probs_V * ratio_V * row.in_support_V
    named_D = columns.total(inside_V) - inside_V.sum() * mean_D
    zero_V = torch.zeros_like(probs_V)
    found = {
        "sampled": _Gradients(ratio_V, -ratio_V, zero_V, nothing_D),
        "coarse": _coarse(row, probs_V, ratio_V, outside_V, named_D),
        "residual": _residual(row, probs_V, ratio_V, outside_V, named_D, tail_D - (probs_V * outside_V).sum() * mean_D),
        "exact": _Gradients(zero_V, zero_V, zero_V, exact_D),
    }
    shared = _Directions(
        torch.stack([mean_D, tail_D]), torch.stack([columns.dots(mean_D), columns.dots(tail_D)], dim=1)
    )
    return {name: _noise(each, probs_V, columns, shared) for name, each in found.items()}


def _coarse(row: Row, probs_V: Tensor, ratio_V: Tensor, outside_V: Tensor, named_D: Tensor) -> _Gradients:
    """The loss as it is without the residual: a drawn token outside the support has a bucket of its own."""
    teacher_V = row.teacher_V.exp()
    tail, teacher_tail = ((each_V * outside_V).sum() for each_V in (probs_V, teacher_V))
    drawn_V = outside_V.to(probs_V.dtype)
    rest_V, teacher_rest_V = tail - drawn_V * probs_V, teacher_tail - drawn_V * teacher_V
    has_rest_V = (rest_V > 1e-12) & (teacher_rest_V > 1e-12)
    log_V = torch.where(has_rest_V, (rest_V.clamp_min(1e-300) / teacher_rest_V.clamp_min(1e-300)).log(), 0.0)
    own_V = drawn_V * probs_V * (ratio_V - log_V)
    return _Gradients(own_V, -drawn_V * probs_V * ratio_V - log_V * rest_V, log_V, named_D)


def _residual(
    row: Row, probs_V: Tensor, ratio_V: Tensor, outside_V: Tensor, named_D: Tensor, tail_push_D: Tensor
) -> _Gradients:
    """`tail_push_D`: P grad log P of the tail's mass P."""
    tail, teacher_tail = ((each_V * outside_V).sum() for each_V in (probs_V, row.teacher_V.exp()))
    log_ratio = (tail / teacher_tail).log() if tail > 0.0 else tail
    drawn_V = outside_V.to(probs_V.dtype)
    # mu = log(P / Q) (t / P - m)
    own_V = drawn_V * ratio_V
    mean_V = drawn_V * (log_ratio - ratio_V)
    tail_V = -drawn_V * log_ratio / tail.clamp_min(1e-300)
    return _Gradients(own_V, mean_V, tail_V, named_D + log_ratio * tail_push_D)


class _Columns:
    """Products with the events' columns; the stop event's is the mean of its ids'."""

    def __init__(self, row: Row) -> None:
        self.columns_VD, self.first = row.columns_VD, row.stop_ids[0] if row.stop_ids else None
        self.squares_V = self.columns_VD.square().sum(1)
        if self.first is not None:
            assert row.stop_shares is not None, "stop ids without their shares"
            self.stop_D = row.stop_shares @ self.columns_VD[list(row.stop_ids)]
            self.squares_V[self.first] = self.stop_D.square().sum()

    def total(self, weight_V: Tensor) -> Tensor:
        """sum_v weight_v e_v, [D]."""
        total_D = weight_V @ self.columns_VD
        if self.first is not None:
            total_D = total_D + weight_V[self.first] * (self.stop_D - self.columns_VD[self.first])
        return total_D

    def dots(self, vector_D: Tensor) -> Tensor:
        """e_v . vector of each event, [V]."""
        dots_V = self.columns_VD @ vector_D
        if self.first is not None:
            dots_V[self.first] = self.stop_D @ vector_D
        return dots_V


def _noise(gradients: _Gradients, probs_V: Tensor, columns: _Columns, shared: _Directions) -> Noise:
    own_V, mean_V, tail_V, constant_D = gradients
    basis_3D = torch.cat([shared.vectors_2D, constant_D[None]])
    weight_V3 = torch.stack([mean_V, tail_V, torch.ones_like(mean_V)], dim=1)
    dots_V3 = torch.cat([shared.dots_V2, columns.dots(constant_D)[:, None]], dim=1)
    square_V = own_V.square() * columns.squares_V + 2.0 * own_V * (weight_V3 * dots_V3).sum(1)
    square_V = square_V + ((weight_V3 @ (basis_3D @ basis_3D.T)) * weight_V3).sum(1)
    expected_D = columns.total(probs_V * own_V) + (probs_V @ weight_V3) @ basis_3D
    return Noise(float((probs_V * square_V).sum() - expected_D.square().sum()), expected_D)
