"""What a teacher says of rows: from their last hidden states to events, a few rows' logits at one time.

Both engines score with it: only the model's own head (bias, scale, soft cap) is theirs.
"""
# R rows, D width, V shared vocabulary, K likeliest events, C candidates

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opsd.engines.logits import top_events
from opsd.types import Rollout, TeacherScores, Vocabulary

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}  # float32 logits [rows, V] that the head makes at once
NO_EVENT = -1e30  # logit of an id that is no event: finite, so that 0 * log 0 is 0


class RowScores(NamedTuple):
    """Of each row: float32 log-probabilities in nats, those of events (see `opsd.types`), exact."""

    top_ids: Tensor  # int32 [R, K], likeliest first; -1 marks an empty slot
    top_logprobs: Tensor  # [R, K]; -inf in an empty slot
    sampled_logprobs: Tensor  # [R], of the event that was sampled
    candidate_logprobs: Tensor  # [R, C]; -inf in an empty slot
    entropy: Tensor  # [R], of the distribution over all events

    def split(self, lengths: Sequence[int]) -> list[RowScores]:
        """One for each run of rows: `lengths` sums to R. Views, no copies."""
        parts = (column.split(list(lengths)) for column in self)
        return [RowScores(*each) for each in zip(*parts, strict=True)]

    def to(self, device: torch.device | str) -> RowScores:
        return RowScores(*(column.to(device) for column in self))


def score_rows(
    hidden_RD: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    rollouts: Sequence[tuple[Rollout, slice]],
    *,
    top_k: int,
    vocabulary: Vocabulary,
) -> RowScores:
    """`logits_of` maps hidden states to the model's logits [rows, >= V]; `rollouts`: which tokens the rows predict,
    one after another. In chunks, so that no more than CHUNK_BYTES of logits exist at one time.
    """
    device = hidden_RD.device
    event_R = _joined([rollout.response_ids[rows] for rollout, rows in rollouts], device)
    event_R = event_R.masked_fill(torch.isin(event_R, _ids(vocabulary.stop_ids, device)), vocabulary.stop_event)
    candidates = [rollout.candidate_ids[rows] for rollout, rows in rollouts]
    width = max(ids.shape[1] for ids in candidates)
    candidates_RC = torch.cat([
        torch.nn.functional.pad(torch.from_numpy(ids), (0, width - ids.shape[1]), value=-1) for ids in candidates
    ])  # fmt: skip
    candidates_RC = candidates_RC.to(device, torch.int64)
    num_rows = max(1, CHUNK_BYTES[device.type] // (4 * vocabulary.size))
    chunks = zip(hidden_RD.split(num_rows), event_R.split(num_rows), candidates_RC.split(num_rows), strict=True)
    parts = [
        _score_chunk(logits_of(hidden)[:, : vocabulary.size], event, named, top_k, vocabulary)
        for hidden, event, named in chunks
    ]
    return RowScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def teacher_scores(
    parts: Sequence[RowScores], *, num_candidates: int | None, hidden: Sequence[Tensor] = ()
) -> TeacherScores:
    """One rollout's, from the runs of its rows in order. `num_candidates` None: it was not asked for candidates.

    `hidden`: the rows' hidden states, where they are to go along.
    """
    columns = {name: torch.cat([getattr(part, name) for part in parts]).cpu().numpy() for name in RowScores._fields}
    candidates_TC = columns.pop("candidate_logprobs")
    asked = None if num_candidates is None else candidates_TC[:, :num_candidates]
    hidden_TD = as_array(torch.cat(list(hidden))) if hidden else None
    return TeacherScores(**columns, candidate_logprobs=asked, hidden=hidden_TD)


def as_array(hidden_TD: Tensor) -> np.ndarray:
    """As TeacherScores has hidden states: numpy knows no bfloat16."""
    hidden_TD = hidden_TD.cpu()
    return hidden_TD.view(torch.uint16).numpy() if hidden_TD.dtype == torch.bfloat16 else hidden_TD.float().numpy()


def _score_chunk(
    logits_RV: Tensor, event_R: Tensor, candidates_RC: Tensor, top_k: int, vocabulary: Vocabulary
) -> RowScores:
    logits_RV = logits_RV.float()
    stop_ids = _ids(vocabulary.stop_ids, logits_RV.device)
    merged_R = logits_RV[:, stop_ids].logsumexp(1)
    no_events = _ids((*vocabulary.foreign_ids, *vocabulary.stop_ids), logits_RV.device)
    logits_RV.index_fill_(1, no_events, NO_EVENT)
    logits_RV[:, vocabulary.stop_event] = merged_R
    logprobs_RV = logits_RV.log_softmax(1)
    probs_RV = torch.exp(logprobs_RV, out=logits_RV)
    entropy_R = -torch.linalg.vecdot(probs_RV, logprobs_RV)
    top_ids_RK, top_logprobs_RK = top_events(logprobs_RV, top_k)
    candidate_RC = logprobs_RV.gather(1, candidates_RC.clamp(min=0))
    return RowScores(
        top_ids=top_ids_RK.masked_fill(top_logprobs_RK < NO_EVENT / 2, -1),
        top_logprobs=top_logprobs_RK.masked_fill(top_logprobs_RK < NO_EVENT / 2, -torch.inf),
        sampled_logprobs=logprobs_RV.gather(1, event_R[:, None])[:, 0],
        candidate_logprobs=candidate_RC.masked_fill(candidates_RC < 0, -torch.inf),
        entropy=entropy_R.clamp_min_(0.0),
    )


def _joined(parts: list, device: torch.device) -> Tensor:
    return torch.cat([torch.from_numpy(part) for part in parts]).to(device, torch.int64)


def _ids(ids: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64, device=device)
