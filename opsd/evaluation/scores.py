"""From graded answers to the figures of an evaluation."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from opsd.evaluation.results import Answer, ProblemResult, ToolUse
from opsd.evaluation.table import PART
from opsd.monitor.tools import TrajectoryCounts, trajectory_metrics


def summarise(results: Sequence[ProblemResult]) -> dict[str, dict[str, float]]:
    """The figures of each data source, and of "all" problems together where there are several sources.

    `problems`; with a grader mean@k, maj@k and pass@1, 2, 4, ... k, each a mean over problems of k answers;
    `truncated`: share of the answers that hit the length limit; `mean_tokens` of an answer. Where the grader gives
    scores, avg@k, the mean over problems of the mean of k, and best@k, of the largest, stand in the place of maj@k, and
    `part/NAME` is the mean of a part over all answers, 0 of an answer in which there was nothing to score. Answers with
    tools have `tools/NAME`, as a step of a training has them (docs/agents.md), over all of them.
    """
    by_source: dict[str, list[ProblemResult]] = {}
    for result in results:
        by_source.setdefault(result.data_source, []).append(result)
    figures = {source: _figures(group) for source, group in by_source.items()}
    if len(figures) == 1:
        return figures
    together = {name: value for name, value in _figures(results).items() if not name.startswith(PART)}
    return {**figures, "all": together}  # other sources' answers are not made of these parts


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k answers is right, drawn without replacement from those that were sampled.

    Unbiased: 1 - C(n - c, k) / C(n, k). Chen et al. 2021 (arXiv 2107.03374), eq. 1. k must be at most num_samples.
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority(answers: Sequence[Answer]) -> float:
    """How right the most frequent extracted answer is: 1 or 0.

    In a tie between several, the share of them that is right. An answer from which nothing was extracted has no vote.
    """
    votes: Counter[str | None] = Counter(answer.extracted for answer in answers if answer.extracted is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    return fmean(bool(answer.correct) for answer in answers if votes[answer.extracted] == most)


def _figures(results: Sequence[ProblemResult]) -> dict[str, float]:
    answers = [answer for result in results for answer in result.answers]
    parts = [answer.parts for answer in answers if answer.parts is not None]
    return {
        "problems": len(results),
        **(_accuracy(results) if answers[0].correct is not None else {}),
        "truncated": fmean(answer.truncated for answer in answers),
        "mean_tokens": fmean(answer.tokens for answer in answers),
        **{f"{PART}{name}": sum(part[name] for part in parts) / len(answers) for name in (parts[0] if parts else ())},
        **trajectory_metrics([_counts(answer.tool_use, answer) for answer in answers if answer.tool_use is not None]),
    }


def _counts(used: ToolUse, answer: Answer) -> TrajectoryCounts:
    return TrajectoryCounts(
        num_turns=len(used.turns),
        num_calls=used.num_calls,
        failures=used.failures,
        end=used.end,
        num_tokens=answer.tokens,
        num_read=used.num_read,
    )


def _accuracy(results: Sequence[ProblemResult]) -> dict[str, float]:
    num_samples = len(results[0].answers)
    powers = [2**exponent for exponent in range(num_samples.bit_length())]
    of_scores = {
        f"avg@{num_samples}": fmean(fmean(result.scores) for result in results),
        f"best@{num_samples}": fmean(max(result.scores) for result in results),
    }
    has_scores = any(answer.score is not None for result in results for answer in result.answers)
    return {
        f"mean@{num_samples}": fmean(result.num_correct / num_samples for result in results),
        **(of_scores if has_scores else {f"maj@{num_samples}": fmean(majority(result.answers) for result in results)}),
        **{
            f"pass@{k}": fmean(pass_at_k(num_samples, result.num_correct, k) for result in results)
            for k in sorted({*powers, num_samples})
        },
    }
