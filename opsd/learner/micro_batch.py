"""What a learner rank works on: kept rows of rollouts, packed without padding."""
# N kept tokens, U support size, B = U + 1 buckets, L tokens of a packed micro-batch, S sequences in it

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsd.types import Mixture


@dataclass(frozen=True, kw_only=True)
class TrainSequence:
    """One rollout as the learner needs it: cut after its last kept row, with the kept rows' supports only."""

    token_ids: np.ndarray  # int32 [L'], prompt and response up to the last kept row
    row_N: np.ndarray  # int64 [N], ascending: rows whose hidden state predicts a kept token
    support_NU: np.ndarray  # int64 [N, U] event ids; -1 marks an empty slot
    teacher_logprobs_NB: np.ndarray  # float32 [N, U + 1], the rest bucket last; -inf in an empty slot
    weight_N: np.ndarray  # float32 [N], already divided by the global batch's sum of weights
    index_N: np.ndarray  # int64 [N], into the global batch's tokens
    temperature_N: np.ndarray | None = None  # float32 [N]
    mixture: Mixture | None = None  # cut to L'
    inputs: dict[str, np.ndarray] = field(default_factory=dict)  # [N] each, see Selection


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Whole TrainSequences packed into one row without padding; position ids restart with each."""

    token_ids_L: Tensor  # int64 [L]
    position_L: Tensor  # int64 [L]
    cu_seq_lens: Tensor  # int32 [S + 1]: 0, then where each sequence ends in the row
    max_length: int  # tokens of the longest sequence; a Python int, so that no layer has to ask a GPU for it
    row_N: Tensor  # int64 [N], into the packed row
    support_NU: Tensor  # int64 [N, U]
    teacher_logprobs_NB: Tensor  # float32 [N, U + 1]
    weight_N: Tensor  # float32 [N]
    index_N: Tensor  # int64 [N], into the global batch's tokens
    temperature_N: Tensor | None = None  # float32 [N]
    other_ids_L: Tensor | None = None  # int64 [L], see Mixture; None: nothing is mixed
    own_share_L: Tensor | None = None  # float32 [L]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # [N] each, see Selection

    def to(self, device: torch.device) -> MicroBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved, inputs={name: value.to(device) for name, value in self.inputs.items()})
