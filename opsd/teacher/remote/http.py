"""The engines of teacher.backend=http: servers that were started with `python -m opsd.teacher.server`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import numpy as np

from opsd.config.engine import EngineSpec, TeacherConfig
from opsd.engines.groups import split_evenly
from opsd.engines.protocols import Request
from opsd.engines.sampling import Sampling
from opsd.errors import ConfigError
from opsd.teacher.remote.frames import MEDIA_TYPE, PROTOCOL
from opsd.teacher.remote.transport import RequestFailed, Transport, get_when_ready, no_scores
from opsd.teacher.remote.wire import pack_generate_request, pack_score_request, unpack_answers, unpack_scores
from opsd.types import NoScores, Prompt, Rollout, TeacherScores

HEADERS = {"Content-Type": MEDIA_TYPE}
FRAME_OVERHEAD_BYTES = 4096  # more than a frame's header has


@dataclass(frozen=True, kw_only=True)
class PendingPart:
    """A request under way and the rollouts that it asks about."""

    rollouts: Sequence[Rollout]
    scores: Future[list[TeacherScores]]


class RemoteEngines:
    """Takes an EnginePool's place in a TeacherPool."""

    def __init__(self, spec: EngineSpec[TeacherConfig]) -> None:
        cfg = self.cfg = spec.config
        self.vocabulary = spec.vocabulary
        self.scores_candidates = spec.scores_candidates  # as far as this run wants them
        self.returns_hidden = spec.returns_hidden
        self.info: dict[str, Any] = {}  # what every server says of itself, from wait_ready on
        self.transport = Transport(cfg.urls, cfg.http)

    def wait_ready(self) -> None:
        self.info = served_info(self.cfg)
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

    def score(self, rollouts: list[Rollout], top_k: int) -> list[PendingPart]:
        """An even part for each server, in as few requests as its limits allow. Does not wait."""
        pending = []
        for share in split_evenly(rollouts, len(self.cfg.urls)):
            costs = [(1, _num_tokens(r), 4 * (_num_tokens(r) + r.candidate_ids.size)) for r in share]
            for part in _within_limits(share, costs, self.info):
                pending.append(self._post_score(part, top_k))
        return pending

    def _post_score(self, rollouts: Sequence[Rollout], top_k: int) -> PendingPart:
        with_candidates = self.info["scores_candidates"] and self.scores_candidates
        body = pack_score_request(
            rollouts, top_k, self.vocabulary, with_candidates=with_candidates, with_hidden=self.returns_hidden
        )
        read = partial(_unpacked_scores, lengths=[len(rollout) for rollout in rollouts])
        scores = self.transport.post("/score", read, content=body, headers=HEADERS)
        return PendingPart(rollouts=rollouts, scores=scores)

    def are_scored(self, pending: list[PendingPart]) -> bool:
        """Whether all of these are answered, or have failed. Does not wait."""
        return all(part.scores.done() for part in pending)

    def scores(self, pending: list[PendingPart]) -> list[TeacherScores | NoScores]:
        """The scores of all parts, in the order of `score`'s rollouts. Raises StageError where the servers are lost.

        A request that fails by itself is asked again in halves, until the rollout that it fails on stands alone.
        """
        found: list[TeacherScores | NoScores] = []
        for part in pending:
            try:
                found += part.scores.result()
            except RequestFailed as failed:
                if len(part.rollouts) == 1:
                    found.append(no_scores(failed))
                else:
                    halves = split_evenly(part.rollouts, 2)
                    found += self.scores([self._post_score(half, self.cfg.top_k) for half in halves])
        return found

    def generate(
        self, requests: list[Request], sampling: Sampling, policy_version: int
    ) -> Iterator[dict[int, Rollout]]:
        """As EnginePool.generate. A teacher's answers have no policy version."""
        under_way = {}
        places = range(len(requests))
        for share in split_evenly(places, len(self.cfg.urls)):
            costs = [(1, len(requests[p][0].token_ids) + sampling.max_tokens, 8 * len(requests[p][0].token_ids))
                     for p in share]  # fmt: skip
            for part in _within_limits(share, costs, self.info):
                prompts, samples, seeds = ([requests[place][i] for place in part] for i in range(3))
                body = pack_generate_request(prompts, seeds, sampling, self.vocabulary)
                read = partial(_unpacked_answers, prompts=prompts, samples=samples)
                under_way[self.transport.post("/generate", read, content=body, headers=HEADERS)] = part
        for answers in as_completed(under_way):
            yield dict(zip(under_way[answers], answers.result(), strict=True))


def served_info(cfg: TeacherConfig) -> dict[str, Any]:
    """What all of the servers say at /info. Raises ConfigError where two differ or one speaks another protocol."""
    infos = {url: get_when_ready(url, "/info", cfg.http).json() for url in cfg.urls}
    first_url, first = next(iter(infos.items()))
    if first.get("protocol") != PROTOCOL:
        raise ConfigError(f"teacher.urls: {first_url} speaks protocol {first.get('protocol')}, expected {PROTOCOL}")
    for url, info in infos.items():
        differ = sorted(name for name in first.keys() | info.keys() if first.get(name) != info.get(name))
        if differ:
            raise ConfigError(
                f"teacher.urls must serve the same teacher: {first_url} and {url} differ in {', '.join(differ)}"
            )
    return first


def _unpacked_scores(response: httpx.Response, lengths: list[int]) -> list[TeacherScores]:
    """Raises WireError."""
    return unpack_scores(response.content, lengths)


def _unpacked_answers(response: httpx.Response, prompts: list[Prompt], samples: list[int]) -> list[Rollout]:
    return unpack_answers(response.content, prompts=prompts, samples=samples)


def _num_tokens(rollout: Rollout) -> int:
    return len(rollout.prompt.scored_after) + len(rollout)


def _within_limits(items: Sequence, costs: list[tuple[int, int, int]], info: dict[str, Any]) -> list[Sequence]:
    """Contiguous parts that each stay below a server's limits of (rollouts, tokens, bytes); a larger item alone."""
    limits = (info["max_rollouts"], info["max_tokens"], info["max_body_bytes"] - FRAME_OVERHEAD_BYTES)
    bounds = [0]
    used: tuple[int, ...] = (0, 0, 0)
    for place, cost in enumerate(costs):
        used = tuple(a + b for a, b in zip(used, cost, strict=True))
        if place > bounds[-1] and any(have > limit for have, limit in zip(used, limits, strict=True)):
            bounds.append(place)
            used = cost
    return [items[start:stop] for start, stop in zip(bounds, [*bounds[1:], len(items)], strict=True) if start < stop]
