"""Which tokens have a bucket of their own in the loss: one rule for a run and its plan."""

from __future__ import annotations

from opsd.errors import ConfigError


def decide_support(wanted: str, scored: dict[str, bool]) -> str:
    """teacher | student | union: loss.support with auto decided.

    `scored`: whether candidates are scored, by the teacher's section. Raises ConfigError for a support that lacks them.
    """
    without = [section for section, scores in scored.items() if not scores]
    if wanted == "auto":
        return "teacher" if without else "union"
    if wanted != "teacher" and without:
        raise ConfigError(
            f"loss.support={wanted} needs the teacher's scores at the student's candidates, which {without[0]} does "
            "not give: take a teacher with backend=vllm (and scoring=rows), transformers or http, or set "
            "loss.support=teacher"
        )
    return wanted
