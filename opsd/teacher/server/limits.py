"""What a teacher server accepts; the rest is refused with a status and one sentence before the engine sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from opsd.teacher.remote.wire import GenerateRequest, ScoreRequest
from opsd.types import Prompt


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
    rollouts: int
    tokens: int
    model_tokens: int  # prompt and response of one rollout
    top_k: int
    vocab_size: int  # ids that the model knows

    def check_body(self, num_bytes: int) -> None:
        if num_bytes > self.body_bytes:
            raise Refusal(413, f"a body may have {self.body_bytes} bytes, got {num_bytes} or more")

    def check_score(self, request: ScoreRequest) -> None:
        self._check_size(request)
        if not 1 <= request.top_k <= self.top_k:
            raise Refusal(422, f"top_k must be in 1..{self.top_k}, got {request.top_k}")
        for place, rollout in enumerate(request.rollouts):
            self._check_length(place, len(rollout.prompt.token_ids) + len(rollout))
        self._check_ids("response_ids", (rollout.response_ids for rollout in request.rollouts), low=0)
        self._check_ids("candidate_ids", (rollout.candidate_ids for rollout in request.rollouts), low=-1)

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
        self._check_ids("prompt_ids", (prompt.token_ids for prompt in prompts), low=0)

    def _check_length(self, place: int, num_tokens: int) -> None:
        if num_tokens > self.model_tokens:
            raise Refusal(
                422, f"rollout {place}: prompt and response may have {self.model_tokens} tokens, got {num_tokens}"
            )

    def _check_ids(self, name: str, arrays: Iterable[np.ndarray], low: int) -> None:
        ids = np.concatenate([array.ravel() for array in arrays])
        if ids.size and (ids.min() < low or ids.max() >= self.vocab_size):
            raise Refusal(422, f"{name} must lie in {low}..{self.vocab_size - 1}, got {ids.min()} to {ids.max()}")
