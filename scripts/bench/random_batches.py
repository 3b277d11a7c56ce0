"""Random rollouts with a teacher's scores, packed for one learner rank: what benchmarks and checks of a step use."""
# T response tokens, V vocabulary, K teacher top-k, B = K + 2 log-probabilities

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from opsd.learner.packing import MicroBatch, pack
from opsd.payload.scored import ScoredBatch
from opsd.types import Prompt, Rollout, ScoredRollout, TeacherScores, Vocabulary
from tip.selectors import SELECTORS


def random_micro_batches(
    response_lengths: Sequence[int],
    *,
    prompt_tokens: int,
    top_k: int,
    ratio: float,
    vocabulary: Vocabulary,
    micro_batch_tokens: int,
) -> list[MicroBatch]:
    """One rollout of each length, of which a random share `ratio` of the tokens is kept."""
    rng = np.random.default_rng(0)
    scored = ScoredBatch(
        items=tuple(
            random_rollout(rng, index, length, prompt_tokens=prompt_tokens, top_k=top_k, vocabulary=vocabulary)
            for index, length in enumerate(response_lengths)
        )
    )
    score_T = torch.from_numpy(rng.random(sum(response_lengths)))
    selection = SELECTORS["top_ratio"](score_T, response_lengths, ratio=ratio)
    [batches] = pack(scored, selection, "teacher", vocabulary, num_ranks=1, max_tokens=micro_batch_tokens)
    return batches


def random_rollout(
    rng: np.random.Generator, index: int, num_tokens: int, *, prompt_tokens: int, top_k: int, vocabulary: Vocabulary
) -> ScoredRollout:
    prompt_ids, response_ids = (
        rng.integers(1, vocabulary.size, size, dtype=np.int32) for size in (prompt_tokens, num_tokens)
    )
    logprobs_TB = torch.randn(num_tokens, top_k + 2, generator=torch.Generator().manual_seed(index)).log_softmax(1)
    # Distinct in a row, and spread over the vocabulary: to draw them without replacement takes minutes at 152k tokens.
    steps_K = np.arange(top_k) * (vocabulary.size // top_k)
    top_ids_TK = (rng.integers(0, vocabulary.size, num_tokens)[:, None] + steps_K) % vocabulary.size
    logprobs_TK = logprobs_TB[:, 1 : top_k + 1].numpy()
    other_stops_TK = np.isin(top_ids_TK, vocabulary.stop_ids[1:])  # the stop event goes by the name of the first
    top_ids_TK = np.where(other_stops_TK, -1, top_ids_TK)
    prompt = Prompt(index=index, token_ids=prompt_ids, text="", answer=None, source="random")
    rollout = Rollout(
        prompt=prompt,
        sample=0,
        response_ids=response_ids,
        sampled_logprobs=logprobs_TB[:, 0].numpy(),
        candidate_ids=response_ids[:, None],
        candidate_logprobs=logprobs_TB[:, :1].numpy(),
        stopped=False,
        policy_version=0,
    )
    scores = TeacherScores(
        top_ids=top_ids_TK.astype(np.int32),
        top_logprobs=np.where(other_stops_TK, -np.inf, logprobs_TK).astype(np.float32),
        sampled_logprobs=logprobs_TB[:, 0].numpy(),
        candidate_logprobs=None,
    )
    return ScoredRollout(rollout=rollout, scores=scores)
