"""Kept rows of whole sequences, packed into padding-free micro-batches, in the rank that works on them."""
# N kept tokens, U support size, B = U + 1 buckets, L tokens of a packed row, S sequences in it

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opsd.batch import ranges
from opsd.learner.dealing import RankWork, deal, require_draws, rows_for, scaled, work_of
from opsd.payload.keeper import KeptHere
from opsd.payload.kept import KeptRows, Wanted, joined, kept_rows
from opsd.payload.scored import ScoredBatch
from opsd.types import Selection, Vocabulary


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences packed into one row without padding, each cut after its last kept row; positions restart with each."""

    token_ids_L: Tensor  # int64 [L]
    position_L: Tensor  # int64 [L]
    cu_seq_lens: Tensor  # int32 [S + 1]: 0, then where each sequence ends in the row
    max_length: int  # tokens of the longest sequence; a Python int, so that no layer has to ask a GPU for it
    row_N: Tensor  # int64 [N], ascending, into the packed row: whose hidden state predicts a kept token
    support_NU: Tensor  # int64 [N, U] event ids; -1 marks an empty slot
    teacher_logprobs_NB: Tensor  # float32 [N, U + 1], the rest bucket last; -inf in an empty slot
    weight_N: Tensor  # float32 [N], already divided by the global batch's sum of weights
    index_N: Tensor  # int64 [N], into the global batch's tokens
    temperature_N: Tensor | None = None  # float32 [N]
    other_ids_L: Tensor | None = None  # int64 [L], see Mixture; None: nothing is mixed
    own_share_L: Tensor | None = None  # float32 [L]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # [N] each, see Selection; and what the loss asked for
    # [N, E] float32 or bfloat16, the teacher's last hidden states; None: its log-probabilities are all that is known
    teacher_hidden_NE: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved, inputs={name: value.to(device) for name, value in self.inputs.items()})


def micro_batches(work: RankWork, parts: Sequence[KeptRows]) -> list[MicroBatch]:
    """The rank's micro-batches, of the rows that it has fetched."""
    rows = joined(parts)
    return [_micro_batch(work, rows, sequences) for sequences in work.micro_batches]


def pack(
    scored: ScoredBatch,
    selection: Selection,
    support: str,
    vocabulary: Vocabulary,
    *,
    num_ranks: int,
    max_tokens: int,
    with_hidden: bool = False,
    asked: Collection[str] = (),
) -> list[list[MicroBatch]]:
    """`deal` and each rank's `micro_batches`, of a batch whose payload is in this process."""
    require_draws(scored.rollouts, asked)
    wanted = Wanted(
        support=support, num_candidates=scored.num_candidates, asked=frozenset(asked), with_hidden=with_hidden
    )
    here = {"payload_R": np.zeros(len(scored.items), np.int64), "first_R": scored.bounds[:-1]}
    shares = deal(scored.rollouts, selection, **here, num_ranks=num_ranks, max_tokens=max_tokens)
    parts = rows_for(shares, [KeptHere(scored, vocabulary)], wanted)
    return [micro_batches(share.work, own) for share, own in zip(shares, parts, strict=True)]


def pack_whole(
    scored: ScoredBatch, selection: Selection, support: str, vocabulary: Vocabulary, *, asked: Collection[str] = ()
) -> MicroBatch:
    """Every rollout that keeps a token, in their order, in one row."""
    require_draws(scored.rollouts, asked)
    wanted = Wanted(support=support, num_candidates=scored.num_candidates, asked=frozenset(asked))
    rows = kept_rows(scored, selection.index_N.numpy(), wanted, vocabulary)
    every = (tuple(range(len(rows.length_S))),)
    [batch] = micro_batches(work_of(scaled(selection), np.arange(len(selection)), every), [rows])
    return batch


def _micro_batch(work: RankWork, rows: KeptRows, sequences: Sequence[int]) -> MicroBatch:
    """These sequences, in this order, packed into one row; without any, one token to run the trunk on."""
    own_S = np.array(sequences, np.int64)
    length_S, num_kept_S = rows.length_S[own_S], rows.num_kept_S[own_S]
    place_L = ranges((np.cumsum(rows.length_S) - rows.length_S)[own_S], length_S)
    place_N = ranges((np.cumsum(rows.num_kept_S) - rows.num_kept_S)[own_S], num_kept_S)
    start_S = np.cumsum(length_S) - length_S
    length_S = length_S if sequences else np.ones(1, np.int64)
    token_ids_L = rows.token_ids_L[place_L] if sequences else np.zeros(1, np.int32)
    row_N = rows.row_N[place_N] + np.repeat(start_S, num_kept_S)
    inputs = {**work.inputs, **rows.inputs}
    hidden_NE = None if rows.hidden_NE is None else torch.from_numpy(rows.hidden_NE[place_N])
    return MicroBatch(
        token_ids_L=torch.from_numpy(token_ids_L.astype(np.int64)),
        position_L=torch.from_numpy(ranges(np.zeros(len(length_S), np.int64), length_S)),
        cu_seq_lens=torch.from_numpy(np.cumsum([0, *length_S], dtype=np.int32)),
        max_length=int(length_S.max()),
        row_N=torch.from_numpy(row_N),
        support_NU=torch.from_numpy(rows.support_NU[place_N].astype(np.int64)),
        teacher_logprobs_NB=torch.from_numpy(rows.teacher_logprobs_NB[place_N]),
        weight_N=torch.from_numpy(work.weight_N[place_N]),
        index_N=torch.from_numpy(work.index_N[place_N]),
        temperature_N=None if work.temperature_N is None else torch.from_numpy(work.temperature_N[place_N]),
        inputs={name: torch.from_numpy(values[place_N]) for name, values in inputs.items()},
        teacher_hidden_NE=_as_tensor(hidden_NE),
        **_mixed(rows, place_L),
    )


def _as_tensor(hidden_NE: Tensor | None) -> Tensor | None:
    """uint16 are the bits of bfloat16, which numpy does not know."""
    return hidden_NE.view(torch.bfloat16) if hidden_NE is not None and hidden_NE.dtype == torch.uint16 else hidden_NE


def _mixed(rows: KeptRows, place_L: np.ndarray) -> dict[str, Any]:
    """Nothing where no sequence of the micro-batch is mixed with another."""
    if rows.own_share_L is None or rows.other_ids_L is None or (rows.own_share_L[place_L] == 1.0).all():
        return {}
    return {
        "other_ids_L": torch.from_numpy(rows.other_ids_L[place_L].astype(np.int64)),
        "own_share_L": torch.from_numpy(rows.own_share_L[place_L]),
    }
