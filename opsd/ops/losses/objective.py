"""What the learner minimises on a kept row: a loss, and further ones beside it, on the row's buckets."""
# N rows, B buckets

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from opsd.errors import StageError
from opsd.ops.row_function import RowFunction, check_row_values, name_of


@dataclass(frozen=True)
class Loss(RowFunction):
    """One loss, by itself or as a part of a sum: see RowFunction."""

    has_value: bool = True  # False: only its gradient has a meaning, so no schedule may follow it
    only_beside: bool = False  # it compares a part of the buckets, so it is no loss by itself
    setting: str = "the loss"  # what named it, for errors


@dataclass(frozen=True)
class Objective:
    """The weighted sum of losses."""

    parts: tuple[tuple[float, Loss], ...]  # (weight, loss)

    @classmethod
    def of(cls, loss: Callable[..., Tensor] | Objective) -> Objective:
        """The objective itself, or a `Loss` or plain function as one of a single part."""
        return loss if isinstance(loss, Objective) else cls(parts=((1.0, Loss.of(loss)),))

    def __call__(self, student_NB: Tensor, teacher_NB: Tensor, **row_inputs: Tensor) -> Tensor:
        """[N] nats. Raises StageError, naming the part, where one does not return one real number per row."""
        total_N = student_NB.new_zeros(len(student_NB))
        for weight, loss in self.parts:
            value_N = loss(student_NB, teacher_NB, **loss.takes(row_inputs))
            try:
                check_row_values(f"{loss.setting}: {name_of(loss)}", value_N, len(student_NB))
            except ValueError as error:
                raise StageError(str(error)) from error
            total_N = total_N + weight * value_N
        return total_N

    @property
    def inputs(self) -> set[str]:
        """Names of the row inputs without which it cannot be called."""
        return {name for _, loss in self.parts for name in loss.inputs}

    def takes(self, available: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `available` that a part takes."""
        return {name: available[name] for name in sorted(self.inputs) if name in available}
