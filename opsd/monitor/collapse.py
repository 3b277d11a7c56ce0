"""Signs of a step gone wrong, for whoever watches: rollouts that were left out, and a student that collapses.

It may have one answer only, repeat itself, say next to nothing, or never end. Each is a line, once, and none ends a
run: what is a collapse in one is another's purpose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from opsd.monitor.warned import Warned
from opsd.types import Rollout

NGRAM = 4  # tokens
LOW_ENTROPY = 1e-3  # of log V, mean over a step's tokens: 0.01 nats where V is 150,000, next to nothing to choose
HIGH_REPETITION = 0.5  # of an answer's 4-grams; a loop soon has nearly all of them twice, and plain text few
HIGH_TRUNCATED = 0.9  # of a step's answers: the loss hardly sees an end
SHORT = 0.25  # of the mean length in the first step that this process has seen


class StepWatch:
    """Warns of what the metrics show, each sign once."""

    def __init__(self, warned: Warned) -> None:
        self._warned = warned
        self._first_length: float | None = None

    def look_at(self, step: int, values: Mapping[str, float | None]) -> None:
        """`values`: what metrics.jsonl has of this step, or of an evaluation after it."""
        if self._first_length is None:
            self._first_length = values.get("response_length")
        for name, sign in {**left_out(values), **signs_of_collapse(values, self._first_length)}.items():
            self._warned.warn(name, f"step {step}: {sign}")


def left_out(values: Mapping[str, float | None]) -> dict[str, str]:
    """A line per reason for which rollouts were dropped, by its metric."""
    return {
        name: f"{count} answers are left out, because of {name.rpartition('/')[2]}: {name} counts them"
        for name, count in values.items()
        if "dropped/" in name and count
    }


def signs_of_collapse(values: Mapping[str, float | None], first_length: float | None) -> dict[str, str]:
    """A line per sign, by its metric. `first_length`: the mean length of the answers in the first step."""
    entropy, repeated, truncated, length = map(values.get, ("entropy", "repetition", "truncated", "response_length"))
    found = {}
    if entropy is not None and entropy < LOW_ENTROPY:
        found["entropy"] = f"the student's entropy is {entropy:.2g} of log V, below {LOW_ENTROPY:g}"
    if repeated is not None and repeated > HIGH_REPETITION:
        found["repetition"] = (
            f"{repeated:.0%} of an answer's {NGRAM}-grams stood in it before, above {HIGH_REPETITION:.0%}: the student "
            "repeats itself"
        )
    if truncated is not None and truncated > HIGH_TRUNCATED:
        found["truncated"] = (
            f"{truncated:.0%} of the answers were cut at rollout.max_response_tokens, above {HIGH_TRUNCATED:.0%}: they "
            "need more room, or the student does not end them"
        )
    if length is not None and first_length is not None and length < SHORT * first_length:
        found["response_length"] = (
            f"the answers have {length:.1f} tokens on average, below {SHORT:.0%} of the {first_length:.1f} in the "
            "first step"
        )
    return found


def repetition(rollouts: Sequence[Rollout]) -> float | None:
    """The mean share of an answer's 4-grams that stood in it before, [0, 1); None where none is that long."""
    shares = [_repeated_share(r.response_ids.astype(np.int64)) for r in rollouts if len(r) >= NGRAM]
    return float(np.mean(shares)) if shares else None


def _repeated_share(ids_T: np.ndarray) -> float:
    pairs = ids_T[:-1] * (int(ids_T.max()) + 1) + ids_T[1:]
    _, pair_T = np.unique(pairs, return_inverse=True)  # small numbers, so that two of them make one that fits
    grams = pair_T[:-2] * len(pairs) + pair_T[2:]
    return 1.0 - len(np.unique(grams)) / len(grams)
