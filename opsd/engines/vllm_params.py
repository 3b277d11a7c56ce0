"""What is asked of vLLM for one request. Imports vLLM."""

from __future__ import annotations

from typing import Any

from vllm import SamplingParams

from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.engines.work import room_of


def sampling_params(sampling: Sampling, request: Request, stop_ids: list[int], num_logprobs: int) -> SamplingParams:
    """An answer, with the log-probabilities of so many ids beside each token."""
    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=room_of(request, sampling.max_tokens),
        seed=request[2],
        ignore_eos=True,  # the shared stop ids alone end an answer
        stop_token_ids=stop_ids,
        logprobs=num_logprobs,
        flat_logprobs=True,
        detokenize=False,
        skip_clone=True,
    )


def scoring_params(**asked: Any) -> SamplingParams:
    """A prompt is read; the one token that vLLM samples after it is nobody's."""
    return SamplingParams(temperature=0.0, max_tokens=1, flat_logprobs=True, detokenize=False, skip_clone=True, **asked)
