"""From an engine's raw log-probabilities to event rows: padded ids dropped, stop ids merged, likeliest first.

An engine reports a few token ids per row, the sampled token first. What leaves here speaks of events (see `opsd.types`)
in arrays of fixed width, with -1 / -inf in an empty slot.
"""
# T rows of a whole batch, M raw entries per row, K events kept per row, R rollouts

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from opsd.types import Vocabulary

MAX_FOREIGN_MASS = 1.0 - 1e-6  # keeps the renormalisation finite where a model puts all of its mass on padded ids


class FlatRows(Protocol):
    """What vLLM's FlatLogprobs holds: the entries of row i lie at start_indices[i] .. end_indices[i] - 1."""

    token_ids: list[int]
    logprobs: list[float]
    start_indices: list[int]
    end_indices: list[int]


@dataclass(frozen=True, kw_only=True)
class EventRows:
    """The likeliest events of each row and the log-probability of the event of the sampled token."""

    top_ids_TK: np.ndarray  # int32, likeliest first, distinct; -1 marks an empty slot
    top_logprobs_TK: np.ndarray  # float32; -inf in an empty slot
    sampled_logprobs_T: np.ndarray  # float32; -inf where the sampled token is no shared id

    def split(self, lengths: Sequence[int]) -> list[EventRows]:
        """One EventRows for each run of rows: `lengths` sums to T. Views, no copies."""
        bounds = np.cumsum(lengths)[:-1]
        parts = (np.split(part, bounds) for part in vars(self).values())
        return [EventRows(**dict(zip(vars(self), arrays, strict=True))) for arrays in zip(*parts, strict=True)]


def has_foreign_ids(token_ids: np.ndarray, vocabulary: Vocabulary) -> bool:
    """True where a token is no shared one (padding, teacher.ignore_tokens): to the other model it is another."""
    return bool(vocabulary.is_foreign(token_ids).any())


def pad_rows(flat_R: Sequence[FlatRows], first_rows_R: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all rollouts one after another, each rollout's from its own first row on.

    Returns ids int32 [T, M] (-1 beyond a row's end) and log-probabilities float32 [T, M] (-inf there).
    """
    ids, logprobs, starts, ends = [], [], [], []
    num_entries = 0
    for flat, first in zip(flat_R, first_rows_R, strict=True):
        begin = flat.start_indices[first]
        ids.append(np.array(flat.token_ids[begin:], np.int32))
        logprobs.append(np.array(flat.logprobs[begin:], np.float32))
        starts.append(np.array(flat.start_indices[first:]) - begin + num_entries)
        ends.append(np.array(flat.end_indices[first:]) - begin + num_entries)
        num_entries += len(ids[-1])
    start_T, end_T = np.concatenate(starts), np.concatenate(ends)
    slot_TM = start_T[:, None] + np.arange((end_T - start_T).max())
    valid_TM = slot_TM < end_T[:, None]
    slot_TM = np.where(valid_TM, slot_TM, 0)
    ids_TM = np.where(valid_TM, np.concatenate(ids)[slot_TM], np.int32(-1))
    return ids_TM, np.where(valid_TM, np.concatenate(logprobs)[slot_TM], np.float32(-np.inf))


def event_rows(ids_TM: np.ndarray, logprobs_TM: np.ndarray, vocabulary: Vocabulary, num_kept: int) -> EventRows:
    """Raw rows, the sampled token in column 0 (and perhaps once more), to the `num_kept` likeliest events each.

    Known mass on ids outside the vocabulary is taken out and the rest of the row renormalised. Every stop id of a row
    adds to the one stop event; a stop id that the engine did not report is not in it.
    """
    repeated_TM = ids_TM == ids_TM[:, :1]
    repeated_TM[:, 0] = False
    logprobs_TM = np.where(repeated_TM | (ids_TM < 0), -np.inf, logprobs_TM)
    logprobs_TM = _drop_foreign(ids_TM, logprobs_TM, vocabulary)
    ids_TM, logprobs_TM, sampled_logprobs_T = _merge_stops(ids_TM, logprobs_TM, vocabulary)

    order_TM = np.argsort(-logprobs_TM, axis=1, kind="stable")[:, :num_kept]
    top_logprobs_TK = np.take_along_axis(logprobs_TM, order_TM, axis=1)
    top_ids_TK = np.where(top_logprobs_TK > -np.inf, np.take_along_axis(ids_TM, order_TM, axis=1), -1)
    missing = ((0, 0), (0, num_kept - top_ids_TK.shape[1]))
    return EventRows(
        top_ids_TK=np.pad(top_ids_TK, missing, constant_values=-1).astype(np.int32),
        top_logprobs_TK=np.pad(top_logprobs_TK, missing, constant_values=-np.inf).astype(np.float32),
        sampled_logprobs_T=sampled_logprobs_T.astype(np.float32),
    )


def _drop_foreign(ids_TM: np.ndarray, logprobs_TM: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The log-probabilities with foreign ids out and the rest renormalised."""
    foreign_TM = vocabulary.is_foreign(ids_TM)
    if not foreign_TM.any():
        return logprobs_TM
    foreign_mass_T = np.exp(np.where(foreign_TM, logprobs_TM, -np.inf), dtype=np.float64).sum(axis=1)
    shared_logmass_T = np.log1p(-np.minimum(foreign_mass_T, MAX_FOREIGN_MASS)).astype(np.float32)
    return np.where(foreign_TM, -np.inf, logprobs_TM - shared_logmass_T[:, None])


def _merge_stops(
    ids_TM: np.ndarray, logprobs_TM: np.ndarray, vocabulary: Vocabulary
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(event ids, log-probabilities, that of column 0's event): the row's first stop id gets the mass of all."""
    stop_TM = np.isin(ids_TM, vocabulary.stop_ids)
    merged_T1 = np.logaddexp.reduce(np.where(stop_TM, logprobs_TM, -np.inf), axis=1, keepdims=True)
    first_TM = stop_TM & (np.cumsum(stop_TM, axis=1) == 1)
    event_ids_TM = np.where(stop_TM, vocabulary.stop_event, ids_TM)
    event_logprobs_TM = np.where(first_TM, merged_T1, np.where(stop_TM, -np.inf, logprobs_TM))
    return event_ids_TM, event_logprobs_TM, event_logprobs_TM[:, 0]
