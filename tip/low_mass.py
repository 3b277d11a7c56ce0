"""A warning for a run that compares the two models on little of what the student finds likely."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from opsd.types import BatchStats
from tip import adjustments
from tip.config import TipRunConfig
from tip.scores import compares, compares_models

LOW_MASS = 0.9  # of the student's, on the tokens that the models are compared on; see TokenStats.named_mass_T


@dataclass
class LowMassWarning:
    """Says once, in one line on stderr, that the models are compared on too little of the student's mass."""

    parts: list[str]  # the settings that compare them; none: there is nothing to say
    said: bool = False

    def look_at(self, batch: BatchStats) -> None:
        mass_T = batch.tokens.named_mass_T
        if self.said or not self.parts or mass_T is None or mass_T.mean() >= LOW_MASS:
            return
        self.said = True
        print(
            f"warning: step {batch.step + 1}: {' and '.join(self.parts)}: the models are compared on tokens that hold "
            f"{mass_T.mean():.2f} of the student's mass, below {LOW_MASS}: the order of the tokens may be chance. A "
            "teacher that scores the student's candidates (teacher.score_candidates; more of them with "
            "rollout.num_candidates), a larger teacher.top_k or selector.score=entropy avoids it; stats=learner does "
            "not",
            file=sys.stderr,
            flush=True,
        )


def comparing_parts(cfg: TipRunConfig) -> list[str]:
    """The settings of a run whose choice or weight of a token comes from a comparison of the two models."""
    scored = cfg.selector.name != "all" and compares_models(cfg.selector.score)
    parts = [f"selector.score={cfg.selector.score}"] if scored else []
    return parts + [f"adjust.{name}" for name in cfg.adjust if compares(adjustments.READS.get(name, ()))]
