"""What vLLM's engine core says of sampled tokens, kept as the arrays that it comes in.

vLLM would append it to Python lists, token by token: some 10 us per token at 64 log-probabilities, which is more than
sampling the token costs. Imports vLLM.
"""
# T tokens of an answer, M log-probabilities per token

from __future__ import annotations

from typing import Any

import numpy as np
from vllm import CompletionOutput
from vllm.v1.engine.logprobs import LogprobsProcessor

from opsd.engines.events import EventRows
from opsd.engines.protocols import Request
from opsd.sequences import version_fields
from opsd.types import Rollout, Vocabulary


class ArrayLogprobs(LogprobsProcessor):
    """Takes the place of vLLM's own in a request that is under way; `CompletionOutput.logprobs` is then its list."""

    def _update_sample_logprobs(self, logprobs_lists: Any) -> None:
        ids_TM, logprobs_TM, *_ = logprobs_lists
        self.logprobs.append((ids_TM, logprobs_TM))


def keep_arrays(llm: Any, names: list[str]) -> None:
    """From now on the requests of these names, which have sampled nothing yet, keep arrays."""
    states = llm.llm_engine.output_processor.request_states
    for name in names:
        own = states[name].logprobs_processor
        states[name].logprobs_processor = ArrayLogprobs(**{**vars(own), "logprobs": []})


def sampled_rows(answers: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Of vLLM's finished answers, one after another: ids int32 [T, M], the sampled one first, and log-probabilities."""
    steps = [step for answer in answers for step in answer.logprobs]
    ids_TM = np.concatenate([ids_TM for ids_TM, _ in steps]).astype(np.int32)
    return ids_TM, np.concatenate([logprobs_TM for _, logprobs_TM in steps]).astype(np.float32)


def rollout_of(request: Request, answer: CompletionOutput, events: EventRows, vocabulary: Vocabulary) -> Rollout:
    """The answer to a request; `events`: its sampled tokens and candidates."""
    prompt, sample, _ = request
    spans = answer.weight_versions
    return Rollout(
        prompt=prompt,
        sample=sample,
        response_ids=np.array(answer.token_ids, np.int32),
        sampled_logprobs=events.sampled_logprobs_T,
        candidate_ids=events.top_ids_TK,
        candidate_logprobs=events.top_logprobs_TK,
        stopped=answer.token_ids[-1] in vocabulary.stop_ids,
        **version_fields(np.repeat([int(s.version) for s in spans], [s.end - s.start for s in spans]).astype(np.int32)),
    )
