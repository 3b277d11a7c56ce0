"""How far the models' likeliest tokens are the same, and what a coarse reverse KL leaves out: a few figures per token.

From what the engines returned, like the statistics of a token, but for looking only: no selection reads them. Nothing
here depends on which token was sampled, but for the estimate that says so.
Source: docs/selection.md, Figures of both models.
"""
# T response tokens, C student candidates, K teacher top-k

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opsd.ops.align import TokenRows, lookup, rest_logprob
from opsd.types import Vocabulary


@dataclass(frozen=True, kw_only=True)
class TopFigures:
    """Figures of tokens at which the student's candidates are known. float64 [T] each, save where it is said."""

    known_T: np.ndarray  # bool: the student named candidates; elsewhere the others are 0
    overlap_T: np.ndarray  # share of the likeliest k of either model that is among the other's, [0, 1]
    advantage_T: np.ndarray  # sum of p |log q - log p| over the candidates whose teacher log-probability is known
    overlap_advantage_T: np.ndarray  # the part of it that lies on tokens of the overlap
    gap_T: np.ndarray  # one draw's estimate of the dense reverse KL less the coarse one on these candidates, nats


def top_figures(rows: TokenRows, vocabulary: Vocabulary) -> TopFigures:
    """`k` is the smaller of the student's number of candidates and the teacher's of likeliest tokens."""
    k = min(rows.candidate_ids_TC.shape[1], rows.top_ids_TK.shape[1])
    own_Tk, teacher_Tk = rows.candidate_ids_TC[:, :k], rows.top_ids_TK[:, :k]
    _, in_both_Tk = lookup(own_Tk, teacher_Tk, rows.top_logprobs_TK[:, :k])
    num_named_T = np.minimum((own_Tk >= 0).sum(axis=1), (teacher_Tk >= 0).sum(axis=1))
    teacher_TC, shared_TC = rows.teacher_at_candidates()
    student_TC = np.where(shared_TC, rows.candidate_logprobs_TC, -np.inf).astype(np.float64)
    teacher_TC = np.where(shared_TC, teacher_TC, -np.inf).astype(np.float64)
    terms_TC = np.exp(student_TC) * np.abs(_difference(teacher_TC, student_TC))
    return TopFigures(
        known_T=num_named_T > 0,
        overlap_T=in_both_Tk.sum(axis=1) / np.maximum(num_named_T, 1),
        advantage_T=terms_TC.sum(axis=1),
        overlap_advantage_T=(terms_TC[:, :k] * in_both_Tk).sum(axis=1),
        gap_T=np.where(num_named_T > 0, _gap(rows, student_TC, teacher_TC, shared_TC, vocabulary), 0.0),
    )


def _gap(
    rows: TokenRows, student_TC: np.ndarray, teacher_TC: np.ndarray, shared_TC: np.ndarray, vocabulary: Vocabulary
) -> np.ndarray:
    """[y outside] log(p_y / q_y) - P log(P / Q), with the masses P and Q outside the candidates. float64 [T].

    Its mean over y drawn from p is P KL(p | outside || q | outside), the dense reverse KL less the coarse one.
    """
    num_named_T = shared_TC.sum(axis=1)
    student_rest_T, teacher_rest_T = (
        rest_logprob(named_TC, num_named_T, vocabulary).astype(np.float64) for named_TC in (student_TC, teacher_TC)
    )
    outside_T = ~(shared_TC & (rows.candidate_ids_TC == rows.events_T[:, None])).any(axis=1)
    sampled_T = (rows.sampled_logprobs_T - rows.teacher_sampled_T).astype(np.float64)
    return np.where(outside_T, sampled_T, 0.0) - np.exp(student_rest_T) * _difference(student_rest_T, teacher_rest_T)


def _difference(of: np.ndarray, less: np.ndarray) -> np.ndarray:
    """of - less; 0 where neither has mass."""
    nothing = np.isneginf(of) & np.isneginf(less)
    return np.where(nothing, 0.0, of) - np.where(nothing, 0.0, less)
