"""What a teacher server accepts; the rest is refused with a status and one sentence before the engine sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from opsd.teacher.remote.wire import GenerateRequest, ScoreRequest, score_bytes
from opsd.types import Prompt, Vocabulary


class Refusal(Exception):
    """A request that is not served: its HTTP status and the reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int
    answer_bytes: int
    rollouts: int
    tokens: int
    model_tokens: int  # prompt and response of one rollout
    top_k: int
    candidates: int  # of each token
    vocab_size: int  # ids that the model knows
    hidden_bytes: int  # of the hidden state of one token; 0: the engine returns none

    def check_body(self, num_bytes: int) -> None:
        if num_bytes > self.body_bytes:
            raise Refusal(413, f"a body may have {self.body_bytes} bytes, got {num_bytes} or more")

    def check_score(self, request: ScoreRequest) -> None:
        self._check_size(request)
        if not 1 <= request.top_k <= self.top_k:
            raise Refusal(422, f"top_k must be in 1..{self.top_k}, got {request.top_k}")
        for place, rollout in enumerate(request.rollouts):
            self._check_length(place, len(rollout.prompt.token_ids) + len(rollout))
        shared = request.vocabulary
        _check_shared("response_ids", (rollout.response_ids for rollout in request.rollouts), shared, low=0)
        _check_shared("candidate_ids", (rollout.candidate_ids for rollout in request.rollouts), shared, low=-1)
        self._check_answer(request)

    def check_generate(self, request: GenerateRequest) -> None:
        self._check_size(request)
        for place, prompt in enumerate(request.prompts):
            self._check_length(place, len(prompt.token_ids) + request.sampling.max_tokens)

    def _check_size(self, request: ScoreRequest | GenerateRequest) -> None:
        prompts: list[Prompt] = request.prompts
        if len(prompts) > self.rollouts:
            raise Refusal(413, f"a request may have {self.rollouts} rollouts, got {len(prompts)}")
        if request.num_tokens > self.tokens:
            raise Refusal(413, f"a request may have {self.tokens} tokens, got {request.num_tokens}")
        if request.vocabulary.size > self.vocab_size:
            raise Refusal(422, f"shared_size must be at most {self.vocab_size}, got {request.vocabulary.size}")
        # A prompt is only read, and may hold what the teacher alone knows.
        _check_ids("prompt_ids", _joined(prompt.token_ids for prompt in prompts), low=0, size=self.vocab_size)

    def _check_length(self, place: int, num_tokens: int) -> None:
        if num_tokens > self.model_tokens:
            raise Refusal(
                422, f"rollout {place}: prompt and response may have {self.model_tokens} tokens, got {num_tokens}"
            )

    def _check_answer(self, request: ScoreRequest) -> None:
        if request.with_hidden and not self.hidden_bytes:
            raise Refusal(422, "with_hidden must be 0: this server's engine returns no hidden states")
        num_candidates = request.rollouts[0].candidate_ids.shape[1]
        if not 1 <= num_candidates <= self.candidates:
            raise Refusal(422, f"candidate_ids must have 1..{self.candidates} columns, got {num_candidates}")
        num_bytes = sum(map(len, request.rollouts)) * score_bytes(
            top_k=request.top_k,
            num_candidates=num_candidates if request.with_candidates else 0,
            hidden_bytes=self.hidden_bytes if request.with_hidden else 0,
        )
        if num_bytes > self.answer_bytes:
            raise Refusal(413, f"an answer may have {self.answer_bytes} bytes, this one would have {num_bytes}")


def _check_shared(name: str, arrays: Iterable[np.ndarray], vocabulary: Vocabulary, low: int) -> None:
    """Whatever is scored must be a token that client and teacher share: no other has a log-probability."""
    ids = _joined(arrays)
    _check_ids(name, ids, low=low, size=vocabulary.size)
    if vocabulary.is_foreign(ids).any():
        raise Refusal(422, f"{name} must hold none of the request's foreign_ids")


def _check_ids(name: str, ids: np.ndarray, *, low: int, size: int) -> None:
    if ids.size and (ids.min() < low or ids.max() >= size):
        raise Refusal(422, f"{name} must lie in {low}..{size - 1}, got {ids.min()} to {ids.max()}")


def _joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays])
