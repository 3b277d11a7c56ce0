"""What the columns of the output head stand for: tokens, and one stop event; which of them a row names."""
# N rows, D width, V vocabulary, U support size

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from opsd.ops.head.plan import HeadPlan


class Events(NamedTuple):
    """What the columns of the head stand for, and at which temperature."""

    support_NU: Tensor
    temperature_N: Tensor | None
    vocab_size: int
    stop_ids: tuple[int, ...]  # ascending; one event, named by the lowest; fewer than two: nothing to merge
    foreign_ids: tuple[int, ...] = ()  # no tokens: they have no probability

    def of(self, rows: slice) -> Events:
        temperature_N = None if self.temperature_N is None else self.temperature_N[rows]
        return self._replace(support_NU=self.support_NU[rows], temperature_N=temperature_N)


def events_of(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    support_NU: Tensor,
    temperature_N: Tensor | None,
    vocab_size: int | None,
    stop_ids: tuple[int, ...],
    foreign_ids: tuple[int, ...],
    plan: HeadPlan,
) -> Events:
    """The events of these arguments. Raises ValueError where a shape or an id does not fit.

    What the ids of the support are is looked at only where the plan may.
    """
    num_rows, num_columns = len(hidden_ND), len(weight_VD)
    vocab_size = num_columns if vocab_size is None else vocab_size
    expect_shape("weight_VD", weight_VD, (num_columns, hidden_ND.shape[-1]))
    expect_shape("support_NU", support_NU, (num_rows, support_NU.shape[-1]))
    if temperature_N is not None:
        expect_shape("temperature_N", temperature_N, (num_rows,))
    if not 0 < vocab_size <= num_columns:
        raise ValueError(f"vocab_size must be in 1..{num_columns}, the rows of the head, got {vocab_size}")
    if len(set(stop_ids)) < len(stop_ids) or not all(0 <= stop_id < vocab_size for stop_id in stop_ids):
        raise ValueError(f"stop_ids must be distinct and in 0..{vocab_size - 1}, got {stop_ids}")
    if plan.may_look and support_NU.numel() > 0:
        _check_ids(support_NU, vocab_size, stop_ids, foreign_ids)
    if stop_ids:  # inside, the lowest names the event: its column comes before those that get parts of its gradient
        support_NU = support_NU.where(support_NU != stop_ids[0], min(stop_ids))
    return Events(support_NU, temperature_N, vocab_size, tuple(sorted(stop_ids)), foreign_ids)


def _check_ids(support_NU: Tensor, vocab_size: int, stop_ids: tuple[int, ...], foreign_ids: tuple[int, ...]) -> None:
    """Twice the same id would count its mass twice; so would a stop id beside the event that it is part of."""
    ascending_NU = support_NU.sort(1).values
    lowest, largest = ascending_NU[:, 0].min().item(), ascending_NU[:, -1].max().item()
    if lowest < -1 or largest >= vocab_size:
        id_found = lowest if lowest < -1 else largest
        raise ValueError(f"support_NU must hold ids below {vocab_size}, or -1 for an empty slot, got {id_found}")
    again_NU = (ascending_NU[:, 1:] == ascending_NU[:, :-1]) & (ascending_NU[:, 1:] >= 0)
    if again_NU.any():
        row, slot = again_NU.nonzero()[0].tolist()
        raise ValueError(f"support_NU must name a token once per row, got {ascending_NU[row, slot]} twice in row {row}")
    for stop_id in stop_ids[1:]:
        is_stop_NU = support_NU == stop_id
        if is_stop_NU.any():
            row = is_stop_NU.nonzero()[0, 0].item()
            raise ValueError(
                f"support_NU must name the stop event by its first id, {stop_ids[0]}, got {stop_id} in row {row}"
            )
    for foreign_id in foreign_ids:
        if (support_NU == foreign_id).any():
            raise ValueError(f"support_NU must name tokens, got {foreign_id}, which is one of foreign_ids")


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
