"""The client of teacher.backend=openai: plain `vllm serve` processes, nothing of ours on their side.

They must be started with room for the log-probabilities that a run asks for (teacher.top_k and one for each further
stop id) and for a prompt with its response and one token more:

    vllm serve MODEL --max-logprobs 80 --max-model-len 10241 --no-enable-prefix-caching --generation-config vllm

`--max-num-batched-tokens` bounds the logits that scoring holds at once; `--api-key` is the token of teacher.http. Only
the named top-k comes back, as JSON (some 60 bytes a log-probability, prompt rows too): our own server sends 8, and no
prompt rows.
"""
# T rows of prompt and response, M raw entries per row

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

import httpx
import numpy as np

from opsd.config.engine import TeacherConfig
from opsd.engines.events import event_rows
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.errors import ConfigError
from opsd.teacher.remote.client import ServedSpec, get_when_ready
from opsd.teacher.remote.transport import RequestFailed, Transport, no_scores
from opsd.types import NoScores, Prompt, Rollout, TeacherScores, Vocabulary

PATH = "/v1/completions"


class OpenAIClient:
    """Asks `vllm serve`, see Client. A rollout a request: the server batches them itself."""

    def __init__(self, spec: ServedSpec) -> None:
        self.vocabulary = spec.vocabulary
        self.model = spec.served["id"]  # the name under which the servers have it
        self.transport = Transport(spec.config.urls, spec.config.http, spec.token)
        self.transport.expect_answer(PATH, json={"model": self.model, "prompt": [0, 0], "max_tokens": 1})

    async def score(self, rollouts: Sequence[Rollout], top_k: int) -> list[TeacherScores | NoScores]:
        return await asyncio.gather(*(self._scores(rollout, top_k) for rollout in rollouts))

    async def _scores(self, rollout: Rollout, top_k: int) -> TeacherScores | NoScores:
        # so many ids may hold only top_k events
        num_logprobs = min(top_k + len(self.vocabulary.stop_ids) - 1, self.vocabulary.size)
        ids = np.concatenate([rollout.prompt.scored_after, rollout.response_ids])
        body = {"model": self.model, "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0.0}
        read = partial(scores_of, rollout, top_k=top_k, vocabulary=self.vocabulary)
        scores = self.transport.post(PATH, read, json={**body, "prompt_logprobs": num_logprobs})
        try:
            return await asyncio.wrap_future(scores)
        except RequestFailed as failed:
            return no_scores(failed)

    async def generate(self, requests: Mapping[int, Request], sampling: Sampling) -> AsyncIterator[dict[int, Rollout]]:
        """Without candidates: one empty slot per token."""
        for answer in asyncio.as_completed(
            [self._answer(place, *asked, sampling) for place, asked in requests.items()]
        ):
            yield await answer

    async def _answer(
        self, place: int, prompt: Prompt, sample: int, seed: int, sampling: Sampling
    ) -> dict[int, Rollout]:
        body = {
            "model": self.model,
            "prompt": prompt.token_ids.tolist(),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,  # this and the next switch off what the model's generation_config.json may ask for
            "repetition_penalty": 1.0,
            "seed": seed,
            "stop_token_ids": list(self.vocabulary.stop_ids),
            "ignore_eos": True,  # the shared stop ids alone end an answer
            "logprobs": 0,
            "return_token_ids": True,
        }
        read = partial(answer_of, prompt, sample, vocabulary=self.vocabulary)
        return {place: await asyncio.wrap_future(self.transport.post(PATH, read, json=body))}


def served_model(cfg: TeacherConfig) -> dict[str, Any]:
    """The one model that all servers have, as /v1/models describes it. Raises ConfigError where they differ."""
    models = {}
    for url in cfg.urls:
        models[url] = get_when_ready(url, "/v1/models", cfg.http, _read_model)
    if len({str(model) for model in models.values()}) > 1:
        raise ConfigError(f"teacher.urls must serve the same teacher, got {models}")
    return next(iter(models.values()))


def _read_model(response: httpx.Response) -> dict[str, Any]:
    """Raises one of UNREADABLE where it is no list of models."""
    model = {name: response.json()["data"][0][name] for name in ("id", "max_model_len")}
    if not isinstance(model["id"], str) or not isinstance(model["max_model_len"], int):
        raise ValueError(f"expected a model's id and max_model_len, got {model}")
    return model


def scores_of(rollout: Rollout, response: httpx.Response, top_k: int, vocabulary: Vocabulary) -> TeacherScores:
    """vLLM's JSON, {token id: {logprob, ...}} or null for each token of prompt and response, as event rows.

    Raises one of UNREADABLE where it is anything else.
    """
    prompt_logprobs = _choice(response)["prompt_logprobs"]
    # Entry i is about token i; null is about the first one only.
    rows: Sequence[dict[str, Any]] = prompt_logprobs[len(rollout.prompt.scored_after) :]
    if len(rows) != len(rollout):
        raise ValueError(f"{len(rows)} rows of prompt_logprobs, expected {len(rollout)}")
    num_entries = 1 + max(map(len, rows))
    ids_TM = np.full((len(rows), num_entries), -1, np.int32)
    logprobs_TM = np.full((len(rows), num_entries), -np.inf, np.float32)
    for t, (row, sampled) in enumerate(zip(rows, rollout.response_ids.tolist(), strict=True)):
        ids_TM[t, : 1 + len(row)] = [sampled, *map(int, row)]  # the sampled token first, and once more in its place
        logprobs = [entry["logprob"] for entry in row.values()]
        logprobs_TM[t, : 1 + len(row)] = [row[str(sampled)]["logprob"], *logprobs]
    events = event_rows(ids_TM, logprobs_TM, vocabulary, top_k)
    return TeacherScores(
        top_ids=events.top_ids_TK,
        top_logprobs=events.top_logprobs_TK,
        sampled_logprobs=events.sampled_logprobs_T,
        candidate_logprobs=None,
    )


def answer_of(prompt: Prompt, sample: int, response: httpx.Response, vocabulary: Vocabulary) -> Rollout:
    """A stop id's log-probability is its own, not that of all stop ids: the server names no others."""
    choice = _choice(response)
    ids = np.array(choice["token_ids"], np.int32)
    if ids.ndim != 1 or ids.min(initial=0) < 0:
        raise ValueError("expected token_ids as a list of ids")
    return Rollout(
        prompt=prompt,
        sample=sample,
        response_ids=ids,
        sampled_logprobs=np.array(choice["logprobs"]["token_logprobs"], np.float32),
        candidate_ids=np.full((len(ids), 1), -1, np.int32),
        candidate_logprobs=np.full((len(ids), 1), -np.inf, np.float32),
        stopped=bool(ids[-1] in vocabulary.stop_ids),
        policy_version=0,
    )


def _choice(response: httpx.Response) -> dict[str, Any]:
    return response.json()["choices"][0]
