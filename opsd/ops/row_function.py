"""A function of the buckets of rows that says what more it needs: a loss, or a statistic of each token."""
# N rows, B buckets, U = B - 1 named tokens

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Entry = TypeVar("Entry", bound="RowFunction")


@dataclass(frozen=True)
class RowFunction:
    """`function(student_logprobs_NB, teacher_logprobs_NB, **inputs, **options) -> [N]`, and its inputs by name.

    An input is a tensor [N, ...]: `support_NU`, the token ids of the buckets but the rest (-1: an empty slot), or, for
    a loss, `outside_N` and `teacher_tail_N` (`sampled_outside` in opsd/ops/align.py) or what the selection gave by that
    name in `Selection.inputs`. Travels to the learner's processes, so the function must be importable there.
    """

    function: Callable[..., Tensor]
    inputs: tuple[str, ...] = ()

    @classmethod
    def of(cls: type[Entry], function: Callable[..., Tensor]) -> Entry:
        """The entry itself, or a plain function as one without inputs."""
        if isinstance(function, cls):
            return function
        return cls(function.function, function.inputs) if isinstance(function, RowFunction) else cls(function)

    def __call__(self, student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, **inputs_and_options: Any) -> Tensor:
        return self.function(student_logprobs_NB, teacher_logprobs_NB, **inputs_and_options)

    def takes(self, available: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `available` that are its inputs."""
        return {name: available[name] for name in self.inputs if name in available}


def name_of(function: Callable[..., Any]) -> str:
    """Where a function is defined, with the options that are bound to it: my_method.total_variation(power=2)."""
    function = getattr(function, "function", function)
    options = getattr(function, "keywords", {})
    inner = getattr(function, "func", function)
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__name__)}"
    return name + (f"({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else "")


def check_row_values(where: str, value_N: Any, num_rows: int) -> None:
    """Raises ValueError unless `value_N` is one real number per row: any other shape would be broadcast."""
    wanted = f"{where} must return one value per row, a tensor of shape ({num_rows},)"
    if not isinstance(value_N, Tensor):
        raise ValueError(f"{wanted}, got {type(value_N).__name__}")
    if tuple(value_N.shape) != (num_rows,):
        raise ValueError(f"{wanted}, got shape {tuple(value_N.shape)}")
    if not value_N.is_floating_point():
        raise ValueError(f"{wanted}, got {value_N.dtype}")
