"""What the learner minimises on a kept row: a divergence, and further terms, on its buckets."""
# N rows, B buckets

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from opsd.errors import ConfigError
from opsd.ops.losses.divergences import forward_kl, reverse_kl
from opsd.ops.losses.policy import kdrl, kdrl_advantage, kdrl_mask, policy_gradient


@dataclass(frozen=True)
class Objective:
    """The weighted sum of functions `f(student_logprobs_NB, teacher_logprobs_NB, **row_inputs) -> [N]`.

    A function that needs more than the buckets (an advantage, say) names it as a keyword-only parameter. A row input
    is a tensor [N, ...]: what the selection put into `Selection.inputs`, or `support_NU`, the token ids of the buckets.
    Travels to the learner's processes, so every function must be importable there.
    """

    parts: tuple[tuple[float, Callable[..., Tensor]], ...]  # (weight, function)

    @classmethod
    def of(cls, function: Callable[..., Tensor] | Objective) -> Objective:
        return function if isinstance(function, Objective) else cls(parts=((1.0, function),))

    def __call__(self, student_NB: Tensor, teacher_NB: Tensor, **row_inputs: Tensor) -> Tensor:
        total_N = student_NB.new_zeros(len(student_NB))
        for weight, function in self.parts:
            own = {name: row_inputs[name] for name in row_input_names(function) if name in row_inputs}
            value_N = function(student_NB, teacher_NB, **own)
            check_values(function, value_N, len(student_NB))
            total_N = total_N + weight * value_N
        return total_N

    def required_inputs(self) -> set[str]:
        """Names of the row inputs without which it cannot be called."""
        return {name for _, function in self.parts for name in row_input_names(function, required=True)}

    def wanted(self, available: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `available` that a part takes."""
        names = {name for _, function in self.parts for name in row_input_names(function)}
        return {name: available[name] for name in sorted(names) if name in available}


@cache
def row_input_names(function: Callable[..., Tensor], *, required: bool = False) -> tuple[str, ...]:
    """Keyword-only parameters of `function` that are named like tensors of rows (`advantage_N`, `support_NU`).

    `required`: only those without a default.
    """
    named = [p for p in inspect.signature(function).parameters.values() if is_row_input(p)]
    return tuple(p.name for p in named if p.default is p.empty or not required)


def is_row_input(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.KEYWORD_ONLY and "_N" in parameter.name


def check_values(function: Callable[..., Tensor], value_N: Any, num_rows: int) -> None:
    """Raises ConfigError unless `function` returned one real number a row: any other shape would be broadcast."""
    wanted = f"the loss: {name_of(function)} must return one value a row, a tensor of shape ({num_rows},)"
    if not isinstance(value_N, Tensor):
        raise ConfigError(f"{wanted}, got {type(value_N).__name__}")
    if tuple(value_N.shape) != (num_rows,):
        raise ConfigError(f"{wanted}, got shape {tuple(value_N.shape)}")
    if not value_N.is_floating_point():
        raise ConfigError(f"{wanted}, got {value_N.dtype}")


def name_of(function: Callable[..., Any]) -> str:
    """Where a function is defined, with the options that are bound to it: my_method.total_variation(power=2)."""
    options = getattr(function, "keywords", {})
    inner = getattr(function, "func", function)
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__name__)}"
    return name + (f"({', '.join(f'{key}={value!r}' for key, value in options.items())})" if options else "")


def forward_then_reverse(
    student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor, *, reverse_share_N: Tensor
) -> Tensor:
    """(1 - share) forward KL + share reverse KL, the share [0, 1] being that of the row."""
    forward_N, reverse_N = (kl(student_logprobs_NB, teacher_logprobs_NB) for kl in (forward_kl, reverse_kl))
    return (1.0 - reverse_share_N) * forward_N + reverse_share_N * reverse_N


# Names of `loss.divergence` beside the divergences: these need row inputs as well.
OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "kdrl": kdrl,
    "kdrl_advantage": kdrl_advantage,
    "kdrl_mask": kdrl_mask,
    "policy_gradient": policy_gradient,
    "forward_then_reverse": forward_then_reverse,
}
REFUSED = {
    "k1": "log pi(y) - log q(y) backpropagated directly has a gradient of 0 in expectation: use kdrl, whose k2 "
    "has that of the reverse KL",
}
