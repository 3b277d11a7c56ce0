"""How far student and teacher agree on a step's tokens, as numbers for metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping


def agreement_metrics(sums: Mapping[str, float], *, whole_draws: bool) -> dict[str, float | None]:
    """Over all response tokens, and kept_* over those that are kept; None where the student named no candidates.

    `sums`: see `agreement_sums` in opsd/payload/scored.py. overlap_ratio: the mean share of the models' likeliest
    tokens that are the same. overlap_token_advantage: the share of sum p |log q - log p|, over candidates and tokens,
    that lies on these. coarse_kl_gap: an estimate of what the coarse reverse KL on the candidates leaves out, nats per
    token, which only `whole_draws` allow: answers drawn at temperature 1 from all tokens. Source:
    docs/selection.md, Figures of both models.
    """
    return {
        "overlap_ratio": _ratio(sums, "overlap", "known"),
        "overlap_token_advantage": _ratio(sums, "overlap_advantage", "advantage"),
        "kept_overlap_ratio": _ratio(sums, "kept_overlap", "kept_known"),
        "kept_overlap_token_advantage": _ratio(sums, "kept_overlap_advantage", "kept_advantage"),
        "coarse_kl_gap": _ratio(sums, "gap", "known") if whole_draws else None,
    }


def _ratio(sums: Mapping[str, float], of: str, to: str) -> float | None:
    return sums[of] / sums[to] if sums.get(to, 0.0) > 0.0 else None
