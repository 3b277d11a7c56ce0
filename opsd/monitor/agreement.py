"""How far student and teacher agree on a step's tokens, as numbers for metrics.jsonl."""
# T response tokens of a step

from __future__ import annotations

import numpy as np

from opsd.batch import ScoredBatch
from opsd.ops.align import TokenRows
from opsd.ops.overlap import TopFigures, top_figures
from opsd.types import Selection, Vocabulary


def agreement_metrics(
    scored: ScoredBatch, selection: Selection, vocabulary: Vocabulary, *, whole_draws: bool
) -> dict[str, float | None]:
    """Over all response tokens, and kept_* over those that are kept; None where the student named no candidates.

    overlap_ratio: the mean share of the models' likeliest tokens that are the same. overlap_token_advantage: the share
    of sum p |log q - log p|, over candidates and tokens, that lies on these. coarse_kl_gap: an estimate of what the
    coarse reverse KL on the candidates leaves out, nats per token, which only `whole_draws` allow: answers drawn at
    temperature 1 from all tokens. Source: docs/selection.md, Figures of both models.
    """
    groups = [top_figures(rows, vocabulary) for rows in TokenRows.in_groups(scored.items, vocabulary)]
    figures = {name: np.concatenate([vars(group)[name] for group in groups]) for name in vars(groups[0])}
    every = TopFigures(**figures)
    kept = TopFigures(**{name: values_T[selection.index_N.numpy()] for name, values_T in figures.items()})
    return {
        "overlap_ratio": _mean(every, every.overlap_T),
        "overlap_token_advantage": _advantage_share(every),
        "kept_overlap_ratio": _mean(kept, kept.overlap_T),
        "kept_overlap_token_advantage": _advantage_share(kept),
        "coarse_kl_gap": _mean(every, every.gap_T) if whole_draws else None,
    }


def _mean(figures: TopFigures, values_T: np.ndarray) -> float | None:
    return float(values_T[figures.known_T].mean()) if figures.known_T.any() else None


def _advantage_share(figures: TopFigures) -> float | None:
    total = figures.advantage_T[figures.known_T].sum()
    return float(figures.overlap_advantage_T[figures.known_T].sum() / total) if total > 0 else None
