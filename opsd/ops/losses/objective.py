"""What the learner minimises on a kept row: a loss, and further ones beside it, on the row's buckets."""
# N rows, B buckets, C columns of the vocabulary

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from opsd.errors import StageError
from opsd.ops.row_function import RowFunction, check_row_values, name_of

# Row inputs that say where the sampled event stands to the support: see `sampled_outside` in opsd/ops/align.py.
RESIDUAL_INPUTS = frozenset({"outside_N", "teacher_tail_N"})
ROLLOUT_LOGPROB = "rollout_logprob_N"  # of the sampled event, in nats, by the weights that sampled it
# Those that the learner's packing makes. A loss's other inputs are the selection's.
PACKED_INPUTS = RESIDUAL_INPUTS | {"support_NU", ROLLOUT_LOGPROB}


@dataclass(frozen=True)
class Loss(RowFunction):
    """One loss, by itself or as a part of a sum: see RowFunction."""

    has_value: bool = True  # False: only its gradient has a meaning, so no schedule may follow it
    only_beside: bool = False  # it compares a part of the buckets, so it is no loss by itself
    # A sum over buckets: on some of them its value is their part of the sum, and a bucket that neither model can reach
    # adds nothing. So it has an exact form, on every token of the vocabulary (`exact_head_loss`), where the
    # log-probabilities of a column that is no token are -1e30.
    by_token: bool = False
    # What such a function needs of whole rows, so that it may see a part of them only: a keyword argument of it, and
    # the function (student_logprobs_NB, teacher_logprobs_NB, **options) -> [N] that makes it, detached.
    row_values: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    # Its gradient is right for answers that the learning weights drew themselves, and not for older weights' answers.
    needs_own_draws: bool = False
    setting: str = "the loss"  # what named it, for errors

    def of_whole_rows(self, student_logprobs_NB: Tensor, teacher_logprobs_NB: Tensor) -> dict[str, Tensor]:
        """Its `row_values`, with the options that are bound to the function."""
        options = getattr(self.function, "keywords", {})
        return {
            name: function(student_logprobs_NB, teacher_logprobs_NB, **options)
            for name, function in self.row_values.items()
        }


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
        return self.on_columns(student_NB, teacher_NB, row_inputs, [{} for _ in self.parts])

    def on_columns(
        self,
        student_NC: Tensor,
        teacher_NC: Tensor,
        row_inputs: Mapping[str, Tensor],
        row_values: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        """Where every part is `by_token`: what these columns add to the row's value. `row_values`: of each part."""
        total_N = student_NC.new_zeros(len(student_NC))
        for (weight, loss), of_rows in zip(self.parts, row_values, strict=True):
            value_N = loss(student_NC, teacher_NC, **loss.takes(row_inputs), **of_rows)
            try:
                check_row_values(f"{loss.setting}: {name_of(loss)}", value_N, len(student_NC))
            except ValueError as error:
                raise StageError(str(error)) from error
            total_N = total_N + weight * value_N
        return total_N

    @property
    def by_token(self) -> bool:
        """Whether it is a sum over the vocabulary, so that it has an exact form."""
        return all(loss.by_token for _, loss in self.parts)

    @property
    def inputs(self) -> set[str]:
        """Names of the row inputs without which it cannot be called."""
        return {name for _, loss in self.parts for name in loss.inputs}

    def takes(self, available: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of `available` that a part takes."""
        return {name: available[name] for name in sorted(self.inputs) if name in available}
