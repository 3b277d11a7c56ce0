"""Rollouts and scores made from dense random distributions, so that a test knows the truth behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opsd.batch import FOREIGN, PendingScores, placed_parts
from opsd.payload.keeper import KeptHere, Payload, ScoredPart, Told, looked_through
from opsd.payload.scored import ScoredBatch
from opsd.types import NoScores, Prompt, Rollout, ScoredRollout, TeacherScores, Vocabulary


def random_logprobs(num_tokens: int, vocab_size: int, seed: int, scale: float = 2.0) -> Tensor:
    """float64 [T, V]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64), -1)


def merge_stops(logprobs_TV: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The same distributions over events: stop ids summed at the first of them, the others empty; padding cut off."""
    merged = torch.log_softmax(logprobs_TV[:, : vocabulary.size], -1)
    stops = list(vocabulary.stop_ids)
    merged[:, stops[0]] = merged[:, stops].logsumexp(-1)
    merged[:, stops[1:]] = -torch.inf
    return merged


def make_scored(
    student_TV: Tensor,
    teacher_TV: Tensor,
    response_ids: list[int],
    *,
    num_candidates: int,
    top_k: int,
    vocabulary: Vocabulary,
    prompt_length: int = 3,
    score_candidates: bool = False,
) -> tuple[Rollout, TeacherScores]:
    """What a rollout engine and a teacher would return for these (event) distributions."""
    response = np.asarray(response_ids, np.int32)
    events = np.where(np.isin(response, vocabulary.stop_ids), vocabulary.stop_event, response)
    rows = np.arange(len(response))
    candidate_logprobs, candidate_ids = student_TV.topk(num_candidates, dim=-1)
    top_logprobs, top_ids = teacher_TV.topk(top_k, dim=-1)
    prompt = Prompt(
        index=0, token_ids=np.arange(1, 1 + prompt_length, dtype=np.int32), text="?", answer=None, source="test"
    )
    rollout = Rollout(
        prompt=prompt,
        sample=0,
        response_ids=response,
        sampled_logprobs=student_TV.numpy()[rows, events].astype(np.float32),
        candidate_ids=np.where(candidate_logprobs.isneginf(), -1, candidate_ids).astype(np.int32),
        candidate_logprobs=candidate_logprobs.numpy().astype(np.float32),
        stopped=True,
        policy_version=0,
    )
    at_candidates = teacher_TV.gather(1, candidate_ids).masked_fill(candidate_logprobs.isneginf(), -torch.inf)
    scores = TeacherScores(
        top_ids=np.where(top_logprobs.isneginf(), -1, top_ids).astype(np.int32),
        top_logprobs=top_logprobs.numpy().astype(np.float32),
        sampled_logprobs=teacher_TV.numpy()[rows, events].astype(np.float32),
        candidate_logprobs=at_candidates.numpy().astype(np.float32) if score_candidates else None,
    )
    return rollout, scores


def scored_rollouts(
    lengths: list[int], vocabulary: Vocabulary, *, top_k: int = 8, seed: int = 0
) -> list[ScoredRollout]:
    """Random rollouts of these lengths."""
    items = []
    for offset, length in enumerate(lengths):
        student, teacher = (
            merge_stops(random_logprobs(length, vocabulary.size, seed + 2 * offset + i), vocabulary) for i in (0, 1)
        )
        response = np.random.default_rng(seed + offset).integers(1, vocabulary.size, length).tolist()
        rollout, scores = make_scored(
            student,
            teacher,
            response,
            num_candidates=top_k,
            top_k=top_k,
            vocabulary=vocabulary,
            prompt_length=2 + offset,
        )
        items.append(ScoredRollout(rollout=rollout, scores=scores))
    return items


def batch_of(items: Sequence[ScoredRollout]) -> ScoredBatch:
    """These rollouts where they were scored."""
    return ScoredBatch(items=tuple(items))


def answered(pending: Sequence[PendingScores]) -> list[tuple[Rollout, TeacherScores | NoScores]]:
    """What came back from a teacher of each rollout, by place."""
    rollouts = {place: rollout for group in pending for place, rollout in group.rollouts.items()}
    scores = dict.fromkeys(rollouts, FOREIGN)
    for _, places, part, payload in placed_parts(pending):
        usable = iter(payload.whole().items if payload is not None and part.stats else ())
        for number, place in enumerate(places):
            scores[place] = part.missing[number] if number in part.missing else next(usable).scores
    return [(rollouts[place], scores[place]) for place in sorted(rollouts)]


class Answered(NamedTuple):
    """A part of the work of a stand-in for engines, which has scored it."""

    num_rollouts: int
    part: ScoredPart
    payload: Payload | None


class Answers:
    """Engines whose answers are there."""

    def are_scored(self, parts):
        return True

    def scores(self, parts):
        return [Told([number], part, payload) for number, (_, part, payload) in enumerate(parts)]


def kept_here(
    rollouts: Sequence[Rollout], scores: Sequence[TeacherScores | NoScores], vocabulary: Vocabulary, teacher: str = "t"
) -> list[Answered]:
    """What `Answers` know of these, in this process."""
    part, scored = looked_through(teacher, rollouts, scores, vocabulary)
    return [Answered(len(rollouts), part, None if scored is None else KeptHere(scored, vocabulary))]
