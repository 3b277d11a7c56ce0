"""What is known of a teacher before a run starts, wherever its weights are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import httpx

from opsd.config.backends import ENGINES
from opsd.config.engine import TeacherConfig, scores_candidates
from opsd.errors import ConfigError
from opsd.models.facts import ModelFacts, read_facts
from opsd.teacher.remote.client import client_settings, describe, get_when_ready, sentence, token_of
from opsd.teacher.remote.http import served_info
from opsd.teacher.remote.openai import PATH, served_model


@dataclass(frozen=True, kw_only=True)
class TeacherFacts:
    model: ModelFacts
    scores_candidates: bool  # whether it returns log-probabilities at the student's candidates


def teacher_facts(cfg: TeacherConfig, role: str) -> TeacherFacts:
    """The facts from the teacher's folder, or from its servers, for which this waits. Raises ConfigError.

    `role` is the section's name.
    """
    asked = scores_candidates(cfg)
    return FACTS[cfg.backend](cfg, role, asked)


def _facts_of_folder(cfg: TeacherConfig, role: str, asked: bool) -> TeacherFacts:
    return TeacherFacts(model=read_facts(f"{role}.path", cfg.path, cfg.trust_remote_code), scores_candidates=asked)


def _facts_of_openai(cfg: TeacherConfig, role: str, asked: bool) -> TeacherFacts:
    """The folder's, with no more context than `vllm serve` was started with."""
    if not cfg.path:
        raise ConfigError(f"{role}.path must name a folder with the served model's config and tokenizer (no weights)")
    facts = _facts_of_folder(cfg, role, asked)
    served = served_model(cfg)
    _check_num_logprobs(cfg, served["id"], facts.model)
    context = min(facts.model.max_position_embeddings, served["max_model_len"])
    return replace(facts, model=replace(facts.model, max_position_embeddings=context))


def _facts_of_http(cfg: TeacherConfig, role: str, asked: bool) -> TeacherFacts:
    """All of it is what the servers say."""
    info = served_info(cfg)
    if cfg.score_candidates and not info["scores_candidates"]:
        raise ConfigError(
            f"teacher.score_candidates=true, but the server at {cfg.urls[0]} does not score the student's candidates: "
            "start it with teacher.backend=transformers or on a GPU"
        )
    if cfg.top_k > info["max_top_k"]:
        raise ConfigError(
            f"teacher.top_k={cfg.top_k}: the server allows {info['max_top_k']} (its own teacher.top_k when it starts)"
        )
    model = ModelFacts(
        tokens=get_when_ready(cfg.urls[0], "/vocabulary", cfg.http, _read_vocabulary),
        vocab_size=info["vocab_size"],
        stop_ids=tuple(info["stop_ids"]),
        max_position_embeddings=info["max_model_tokens"],
    )
    return TeacherFacts(model=model, scores_candidates=asked and info["scores_candidates"])


def _read_vocabulary(response: httpx.Response) -> tuple[str | None, ...]:
    """Raises ValueError where it is none."""
    tokens = response.json()
    if not isinstance(tokens, list) or not all(token is None or isinstance(token, str) for token in tokens):
        raise ValueError("expected a JSON list of tokens")
    return tuple(tokens)


FACTS: dict[str, Callable[[TeacherConfig, str, bool], TeacherFacts]] = {
    **dict.fromkeys(ENGINES, _facts_of_folder),
    "http": _facts_of_http,
    "openai": _facts_of_openai,
}


def _check_num_logprobs(cfg: TeacherConfig, name: str, model: ModelFacts) -> None:
    """vLLM's default allows 20: ask once, before a model is loaded here."""
    num_logprobs = min(cfg.top_k + len(model.stop_ids) - 1, model.vocab_size)
    body = {"model": name, "prompt": [0, 0], "max_tokens": 1, "prompt_logprobs": num_logprobs}
    try:
        with httpx.Client(**client_settings(cfg.http, token_of(cfg.http))) as client:
            response = client.post(cfg.urls[0].rstrip("/") + PATH, json=body)
    except httpx.RequestError as error:
        raise ConfigError(f"teacher.urls: {cfg.urls[0]}{PATH} has not answered: {describe(error)}") from error
    if response.status_code != 200:
        raise ConfigError(
            f"teacher.top_k={cfg.top_k}: {cfg.urls[0]} does not return {num_logprobs} log-probabilities (start it with "
            f"--max-logprobs {num_logprobs}): {response.status_code} {sentence(response)}"
        )
