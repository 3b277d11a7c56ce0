"""The client of teacher.backend=http: servers that were started with `python -m opsd.teacher.server`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import httpx
import numpy as np

from opsd.config.engine import TeacherConfig
from opsd.engines.groups import split_evenly
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.errors import ConfigError
from opsd.teacher.remote.client import ServedSpec, get_when_ready
from opsd.teacher.remote.frames import MEDIA_TYPE, PROTOCOL
from opsd.teacher.remote.transport import RequestFailed, Transport, no_scores
from opsd.teacher.remote.wire import (
    check_ids,
    check_scores,
    pack_generate_request,
    pack_score_request,
    score_bytes,
    unpack_answers,
    unpack_scores,
)
from opsd.types import NoScores, Prompt, Rollout, TeacherScores, Vocabulary

HEADERS = {"Content-Type": MEDIA_TYPE}
ANSWER_BYTES = 16  # of each token that a teacher writes: id, log-probability, and a candidate's
FRAME_OVERHEAD_BYTES = 4096  # more than a frame's header has
LIMITS = ("max_rollouts", "max_tokens", "max_body_bytes", "max_answer_bytes")
INFO = {  # what a server of our protocol says of itself, as far as it is read here
    **dict.fromkeys((*LIMITS, "protocol", "vocab_size", "max_model_tokens", "max_top_k", "hidden_bytes"), int),
    "stop_ids": list,
    "scores_candidates": bool,
}


class HttpClient:
    """Asks servers of ours, see Client."""

    def __init__(self, spec: ServedSpec) -> None:
        self.cfg = spec.config
        self.vocabulary = spec.vocabulary
        self.scores_candidates = spec.scores_candidates  # as far as this run wants them
        self.returns_hidden = spec.returns_hidden
        self.info = spec.served
        self.transport = Transport(spec.config.urls, spec.config.http, spec.token)
        self.transport.expect_answer("/score", content=self._shortest_request(), headers=HEADERS)

    def _shortest_request(self) -> bytes:
        """One token after another, scored at one token."""
        one = np.zeros(1, np.int32)
        prompt = Prompt(index=0, token_ids=one, text="", answer=None, source="")
        rollout = Rollout(
            prompt=prompt,
            sample=0,
            response_ids=one,
            sampled_logprobs=np.zeros(1, np.float32),
            candidate_ids=one[:, None],
            candidate_logprobs=np.zeros((1, 1), np.float32),
            stopped=False,
            policy_version=0,
        )
        return pack_score_request([rollout], 1, self.vocabulary, with_candidates=False)

    async def score(self, rollouts: Sequence[Rollout], top_k: int) -> list[TeacherScores | NoScores]:
        """An even part for each server, in as few requests as its limits allow."""
        shares = split_evenly(rollouts, len(self.cfg.urls))
        costs = [[self._cost(rollout, top_k) for rollout in share] for share in shares]
        parts = [
            part for share, cost in zip(shares, costs, strict=True) for part in _within_limits(share, cost, self.info)
        ]
        return await self._all_scores(parts, top_k)

    async def _all_scores(self, parts: Sequence[Sequence[Rollout]], top_k: int) -> list[TeacherScores | NoScores]:
        found = await asyncio.gather(*(self._scores(part, top_k) for part in parts))
        return [scores for part in found for scores in part]

    async def _scores(self, rollouts: Sequence[Rollout], top_k: int) -> Sequence[TeacherScores | NoScores]:
        """A request that fails by itself is asked again in halves, until the rollout that it fails on stands alone."""
        try:
            return await asyncio.wrap_future(self._post_score(rollouts, top_k))
        except RequestFailed as failed:
            if len(rollouts) == 1:
                return [no_scores(failed)]
            return await self._all_scores(split_evenly(rollouts, 2), top_k)

    @property
    def _with_candidates(self) -> bool:
        return self.info["scores_candidates"] and self.scores_candidates

    def _cost(self, rollout: Rollout, top_k: int) -> tuple[int, ...]:
        """Of scoring it, as LIMITS count."""
        num_tokens = _num_tokens(rollout)
        answer_bytes = len(rollout) * score_bytes(
            top_k=top_k,
            num_candidates=rollout.candidate_ids.shape[1] if self._with_candidates else 0,
            hidden_bytes=self.info["hidden_bytes"] if self.returns_hidden else 0,
        )
        return (1, num_tokens, 4 * (num_tokens + rollout.candidate_ids.size), answer_bytes)

    def _post_score(self, rollouts: Sequence[Rollout], top_k: int) -> Future[list[TeacherScores]]:
        with_candidates, with_hidden = self._with_candidates, self.returns_hidden
        body = pack_score_request(
            rollouts, top_k, self.vocabulary, with_candidates=with_candidates, with_hidden=with_hidden
        )
        read = partial(
            _unpacked_scores,
            rollouts=rollouts,
            check=partial(
                check_scores,
                top_k=top_k,
                vocabulary=self.vocabulary,
                with_candidates=with_candidates,
                with_hidden=with_hidden,
            ),
        )
        return self.transport.post("/score", read, content=body, headers=HEADERS)

    async def generate(self, requests: Mapping[int, Request], sampling: Sampling) -> AsyncIterator[dict[int, Rollout]]:
        under_way = []
        for share in split_evenly(list(requests), len(self.cfg.urls)):
            costs = [
                (1, len(ids) + sampling.max_tokens, 8 * len(ids), ANSWER_BYTES * sampling.max_tokens)
                for ids in (requests[place][0].token_ids for place in share)
            ]
            for part in _within_limits(share, costs, self.info):
                under_way.append(self._answers({place: requests[place] for place in part}, sampling))
        for answers in asyncio.as_completed(under_way):
            yield await answers

    async def _answers(self, requests: dict[int, Request], sampling: Sampling) -> dict[int, Rollout]:
        """Of one request for all of these."""
        prompts = [prompt for prompt, _, _ in requests.values()]
        samples = [sample for _, sample, _ in requests.values()]
        seeds = [seed for _, _, seed in requests.values()]
        body = pack_generate_request(prompts, seeds, sampling, self.vocabulary)
        read = partial(_unpacked_answers, prompts=prompts, samples=samples, vocabulary=self.vocabulary)
        answers = await asyncio.wrap_future(self.transport.post("/generate", read, content=body, headers=HEADERS))
        return dict(zip(requests, answers, strict=True))


def served_info(cfg: TeacherConfig) -> dict[str, Any]:
    """What all of the servers say at /info. Raises ConfigError where two differ or one speaks another protocol."""
    infos = {url: get_when_ready(url, "/info", cfg.http, _read_info) for url in cfg.urls}
    first_url, first = next(iter(infos.items()))
    for url, info in infos.items():
        if info["protocol"] != PROTOCOL:
            raise ConfigError(f"teacher.urls: {url} speaks protocol {info['protocol']}, expected {PROTOCOL}")
        differ = sorted(name for name in first.keys() | info.keys() if first.get(name) != info.get(name))
        if differ:
            raise ConfigError(
                f"teacher.urls must serve the same teacher: {first_url} and {url} differ in {', '.join(differ)}"
            )
    return first


def _read_info(response: httpx.Response) -> dict[str, Any]:
    """Raises ValueError where it is no server's."""
    info = response.json()
    if not isinstance(info, dict) or not isinstance(info.get("protocol"), int):
        raise ValueError("expected a JSON object with a protocol")
    wrong = [name for name, kind in INFO.items() if not isinstance(info.get(name), kind)]
    if info["protocol"] == PROTOCOL and wrong:
        raise ValueError(f"expected {wrong[0]} as {INFO[wrong[0]].__name__}, got {info.get(wrong[0])!r}")
    return info


def _unpacked_scores(
    response: httpx.Response, rollouts: Sequence[Rollout], check: Callable[[TeacherScores, Rollout], None]
) -> list[TeacherScores]:
    """Raises ValueError where the frame answers another question."""
    scores = unpack_scores(response.content, [len(rollout) for rollout in rollouts])
    for rollout, each in zip(rollouts, scores, strict=True):
        check(each, rollout)
    return scores


def _unpacked_answers(
    response: httpx.Response, prompts: list[Prompt], samples: list[int], vocabulary: Vocabulary
) -> list[Rollout]:
    answers = unpack_answers(response.content, prompts=prompts, samples=samples)
    for answer in answers:
        check_ids("response_ids", answer.response_ids, vocabulary)
    return answers


def _num_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt.scored_after) + len(rollout)


def _within_limits(items: Sequence, costs: Sequence[tuple[int, ...]], info: dict[str, Any]) -> list[Sequence]:
    """Contiguous parts that each stay below a server's LIMITS; an item that does not stays alone."""
    limits = [info[name] - (FRAME_OVERHEAD_BYTES if name.endswith("_bytes") else 0) for name in LIMITS]
    bounds = [0]
    used: tuple[int, ...] = (0,) * len(LIMITS)
    for place, cost in enumerate(costs):
        used = tuple(a + b for a, b in zip(used, cost, strict=True))
        if place > bounds[-1] and any(have > limit for have, limit in zip(used, limits, strict=True)):
            bounds.append(place)
            used = cost
    return [items[start:stop] for start, stop in zip(bounds, [*bounds[1:], len(items)], strict=True) if start < stop]
