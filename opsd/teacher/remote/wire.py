"""What client and teacher server say to each other: rollouts and scores, prompts and answers, as frames."""
# T response tokens of all rollouts, C student candidates

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsd.engines.sampling import Sampling
from opsd.teacher.remote.frames import WireError, expect, from_frame, number, pack_sequences, to_frame, unpack_sequences
from opsd.types import Prompt, Rollout, TeacherScores, Vocabulary

MOST_IDS = 2**20  # of a vocabulary; several times what the largest has


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """Rollouts to score; of these only prompt, response and candidates travelled."""

    rollouts: list[Rollout]
    top_k: int
    vocabulary: Vocabulary  # of the client's run: what it shares with this teacher
    with_candidates: bool  # whether it wants the log-probabilities at the candidates
    with_hidden: bool = False  # whether it wants the hidden states

    @property
    def prompts(self) -> list[Prompt]:
        return [rollout.prompt for rollout in self.rollouts]

    @property
    def num_tokens(self) -> int:
        return sum(len(rollout.prompt.token_ids) + len(rollout) for rollout in self.rollouts)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """Prompts that the teacher answers itself."""

    prompts: list[Prompt]
    seeds: list[int]
    sampling: Sampling
    vocabulary: Vocabulary

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt.token_ids) + self.sampling.max_tokens for prompt in self.prompts)


def pack_score_request(
    rollouts: Sequence[Rollout],
    top_k: int,
    vocabulary: Vocabulary,
    *,
    with_candidates: bool,
    with_hidden: bool = False,
) -> bytes:
    arrays = {
        **pack_sequences("prompt", [rollout.prompt.scored_after for rollout in rollouts]),
        **pack_sequences("response", [rollout.response_ids for rollout in rollouts]),
        **_pack_vocabulary(vocabulary),
        "top_k": np.array(top_k, np.int32),
        "with_hidden": np.array(with_hidden, np.int32),
    }
    if with_candidates:
        arrays["candidate_ids"] = np.concatenate([rollout.candidate_ids for rollout in rollouts])  # [T, C]
    return to_frame(arrays)


def unpack_score_request(body: bytes) -> ScoreRequest:
    """Raises WireError, or ValueError for numbers that cannot be."""
    arrays = from_frame(body)
    prompts = [_prompt(ids) for ids in unpack_sequences("prompt", arrays)]
    responses = unpack_sequences("response", arrays)
    with_candidates = "candidate_ids" in arrays
    num_tokens = sum(map(len, responses))
    if with_candidates:
        candidates_TC = expect("candidate_ids", arrays, np.int32, 2)
    else:
        candidates_TC = np.full((num_tokens, 1), -1, np.int32)
    if len(prompts) != len(responses) or len(candidates_TC) != num_tokens:
        raise WireError(
            f"{len(prompts)} prompts, {len(responses)} responses of {num_tokens} tokens and candidate_ids of "
            f"{len(candidates_TC)} rows do not belong together"
        )
    parts = np.split(candidates_TC, np.cumsum([len(ids) for ids in responses])[:-1]) if responses else []
    return ScoreRequest(
        rollouts=[_unscored(*each) for each in zip(prompts, responses, parts, strict=True)],
        top_k=number("top_k", arrays),
        vocabulary=_unpack_vocabulary(arrays),
        with_candidates=with_candidates,
        with_hidden=bool(number("with_hidden", arrays)),
    )


def pack_scores(scores: Sequence[TeacherScores], *, with_candidates: bool) -> bytes:
    names = ["top_ids", "top_logprobs", "sampled_logprobs"]
    names += [name for name in ("entropy", "hidden") if all(getattr(score, name) is not None for score in scores)]
    if with_candidates and all(score.candidate_logprobs is not None for score in scores):
        names.append("candidate_logprobs")
    return to_frame({name: np.concatenate([getattr(score, name) for score in scores]) for name in names})


def score_bytes(*, top_k: int, num_candidates: int, hidden_bytes: int) -> int:
    """Of the answer, for each response token: ids and log-probabilities of the top k, its own, the entropy, the rest.

    `num_candidates` and `hidden_bytes`: 0 where they are not asked for.
    """
    return 8 * top_k + 4 + 4 + 4 * num_candidates + hidden_bytes


def unpack_scores(body: bytes, lengths: Sequence[int]) -> list[TeacherScores]:
    """The scores of rollouts of these lengths. Raises WireError where the frame answers other ones."""
    arrays = from_frame(body)
    parts: dict[str, Any] = {
        "top_ids": expect("top_ids", arrays, np.int32, 2),
        "top_logprobs": expect("top_logprobs", arrays, np.float32, 2),
        "sampled_logprobs": expect("sampled_logprobs", arrays, np.float32, 1),
    }
    if "entropy" in arrays:
        parts["entropy"] = expect("entropy", arrays, np.float32, 1)
    if "hidden" in arrays:
        dtype = np.uint16 if arrays["hidden"].dtype == np.uint16 else np.float32
        parts["hidden"] = expect("hidden", arrays, dtype, 2)
    if "candidate_logprobs" in arrays:
        parts["candidate_logprobs"] = expect("candidate_logprobs", arrays, np.float32, 2)
    for name, rows in parts.items():
        if len(rows) != sum(lengths):
            raise WireError(f"{name} has {len(rows)} rows, expected {sum(lengths)}")
    bounds = np.cumsum(lengths)[:-1]
    split: dict[str, Any] = {name: np.split(rows, bounds) for name, rows in parts.items()}
    split.setdefault("candidate_logprobs", [None] * len(lengths))
    return [TeacherScores(**{name: each[place] for name, each in split.items()}) for place in range(len(lengths))]


def check_scores(
    scores: TeacherScores,
    rollout: Rollout,
    *,
    top_k: int,
    vocabulary: Vocabulary,
    with_candidates: bool,
    with_hidden: bool,
) -> None:
    """Raises WireError unless these could be the scores that were asked for."""
    expected = {
        "top_ids": (len(rollout), top_k),
        "candidate_logprobs": rollout.candidate_ids.shape if with_candidates else None,
        "hidden": (len(rollout), 0 if scores.hidden is None else scores.hidden.shape[-1]) if with_hidden else None,
    }
    for name, shape in expected.items():
        array = getattr(scores, name)
        got = None if array is None else array.shape
        if shape is not None and got != shape:
            raise WireError(f"{name} must have shape {shape}, got {got}")
    check_ids("top_ids", scores.top_ids, vocabulary, low=-1)


def check_ids(name: str, ids: np.ndarray, vocabulary: Vocabulary, low: int = 0) -> None:
    """Raises WireError for an id that is none of the shared vocabulary."""
    if ids.size and (ids.min() < low or ids.max() >= vocabulary.size):
        raise WireError(f"{name} must lie in {low}..{vocabulary.size - 1}, got {ids.min()} to {ids.max()}")


def pack_generate_request(
    prompts: Sequence[Prompt], seeds: Sequence[int], sampling: Sampling, vocabulary: Vocabulary
) -> bytes:
    arrays = {
        **pack_sequences("prompt", [prompt.token_ids for prompt in prompts]),
        **_pack_vocabulary(vocabulary),
        "seeds": np.array(seeds, np.int32),
        "max_tokens": np.array(sampling.max_tokens, np.int32),
        "top_k": np.array(sampling.top_k, np.int32),
        "temperature": np.array([sampling.temperature, sampling.top_p], np.float32),
    }
    return to_frame(arrays)


def unpack_generate_request(body: bytes) -> GenerateRequest:
    """Raises WireError, or ValueError for numbers that cannot be."""
    arrays = from_frame(body)
    prompts = [_prompt(ids) for ids in unpack_sequences("prompt", arrays)]
    seeds = expect("seeds", arrays, np.int32, 1).tolist()
    temperature = expect("temperature", arrays, np.float32, 1)
    if len(seeds) != len(prompts) or len(temperature) != 2 or min(seeds, default=0) < 0:
        raise WireError("expected one seed >= 0 for each prompt, and temperature and top_p")
    sampling = Sampling(
        temperature=float(temperature[0]),
        top_p=float(temperature[1]),
        top_k=number("top_k", arrays),
        max_tokens=number("max_tokens", arrays),
        num_candidates=1,
    )
    return GenerateRequest(prompts=prompts, seeds=seeds, sampling=sampling, vocabulary=_unpack_vocabulary(arrays))


def pack_answers(answers: Sequence[Rollout]) -> bytes:
    names = ["sampled_logprobs", "candidate_ids", "candidate_logprobs"]
    return to_frame(
        {
            **pack_sequences("response", [answer.response_ids for answer in answers]),
            **{name: np.concatenate([getattr(answer, name) for answer in answers]) for name in names},
            "stopped": np.array([answer.stopped for answer in answers], np.int32),
        }
    )


def unpack_answers(body: bytes, prompts: Sequence[Prompt], samples: Sequence[int]) -> list[Rollout]:
    """The teacher's answers to these prompts. Raises WireError where the frame answers others."""
    arrays = from_frame(body)
    responses = unpack_sequences("response", arrays)
    stopped = expect("stopped", arrays, np.int32, 1)
    if len(responses) != len(prompts) or len(stopped) != len(prompts):
        raise WireError(f"{len(responses)} answers, expected {len(prompts)}")
    bounds = np.cumsum([len(ids) for ids in responses])[:-1]
    sampled_logprobs = np.split(expect("sampled_logprobs", arrays, np.float32, 1), bounds)
    candidate_ids = np.split(expect("candidate_ids", arrays, np.int32, 2), bounds)
    candidate_logprobs = np.split(expect("candidate_logprobs", arrays, np.float32, 2), bounds)
    return [
        Rollout(
            prompt=prompt,
            sample=sample,
            response_ids=responses[place],
            sampled_logprobs=sampled_logprobs[place],
            candidate_ids=candidate_ids[place],
            candidate_logprobs=candidate_logprobs[place],
            stopped=bool(stopped[place]),
            policy_version=0,
        )
        for place, (prompt, sample) in enumerate(zip(prompts, samples, strict=True))
    ]


def _pack_vocabulary(vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    return {
        "shared_size": np.array(vocabulary.size, np.int32),
        "stop_ids": np.array(vocabulary.stop_ids, np.int32),
        "foreign_ids": np.array(vocabulary.foreign_ids, np.int32),
    }


def _unpack_vocabulary(arrays: dict[str, np.ndarray]) -> Vocabulary:
    size = number("shared_size", arrays)
    ids = {name: expect(name, arrays, np.int32, 1) for name in ("stop_ids", "foreign_ids")}
    if not 1 <= size <= MOST_IDS or any(len(each) > size for each in ids.values()):
        lengths = " and ".join(f"{len(each)} {name}" for name, each in ids.items())
        raise WireError(f"shared_size must be in 1..{MOST_IDS} and not below the number of ids, got {size}, {lengths}")
    return Vocabulary(size=size, **{name: tuple(each.tolist()) for name, each in ids.items()})


def _prompt(token_ids: np.ndarray) -> Prompt:
    return Prompt(index=0, token_ids=token_ids, text="", answer=None, source="http")


def _unscored(prompt: Prompt, response_ids: np.ndarray, candidates_TC: np.ndarray) -> Rollout:
    return Rollout(
        prompt=prompt,
        sample=0,
        response_ids=response_ids,
        sampled_logprobs=np.zeros(len(response_ids), np.float32),
        candidate_ids=candidates_TC,
        candidate_logprobs=np.zeros(candidates_TC.shape, np.float32),
        stopped=False,
        policy_version=0,
    )
