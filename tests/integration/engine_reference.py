"""What the engines' tests are made of: models, prompts, and what a plain transformers forward pass in float64 says."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opsd.config.engine import RolloutConfig
from opsd.engines.groups import in_order
from opsd.engines.sampling import Sampling
from opsd.engines.vllm import engine_environment
from opsd.types import Prompt, Rollout, TeacherScores, Vocabulary
from tests.tiny_models import make_tiny_qwen3

NUM_IDS = 64
OWN_EOS = 5  # what the model's own config names as its end; no stop id of the run
VOCABULARY = Vocabulary(size=NUM_IDS, stop_ids=(2, 9))
SAMPLING = Sampling(temperature=1.0, top_p=1.0, max_tokens=24, num_candidates=8)
CLOSE = {"atol": 1e-4, "rtol": 0}


@contextmanager
def cpu_engine_process() -> Iterator[pytest.MonkeyPatch]:
    """What an actor's environment would have set before the first import. What is patched is undone at the end."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in engine_environment(RolloutConfig(), "cpu").items():
            patch.setenv(name, value)
        patch.setattr(torch._dynamo.config, "disable", True)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield patch
        torch.set_num_threads(num_threads)


def make_models(folder: Path) -> dict[str, Path]:
    """Folders: a tied and an untied model, other weights for each, and one with 16 padded ids.

    "own_head" says in its config that its head is tied, and its file holds another one.
    """
    make = {"eos_token_id": OWN_EOS, "scale": 2.0}
    for name, seed in (("own_head", 6), ("own_head_new", 7)):
        path = make_tiny_qwen3(folder / name, tied=False, seed=seed, **make)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return {
        "tied": make_tiny_qwen3(folder / "tied", tied=True, seed=1, **make),
        "tied_new": make_tiny_qwen3(folder / "tied_new", tied=True, seed=2, **make),
        "untied": make_tiny_qwen3(folder / "untied", tied=False, seed=3, **make),
        "untied_new": make_tiny_qwen3(folder / "untied_new", tied=False, seed=4, **make),
        "own_head": folder / "own_head",
        "own_head_new": folder / "own_head_new",
        "padded": make_tiny_qwen3(folder / "padded", tied=True, seed=5, vocab_size=NUM_IDS + 16, **make),
    }


def make_prompts(num_prompts: int) -> list[Prompt]:
    """Lengths 3 to 11."""
    rng = np.random.default_rng(7)
    return [
        Prompt(index=i, token_ids=rng.integers(0, NUM_IDS, 3 + i % 9).astype(np.int32), text="", answer=None, source="")
        for i in range(num_prompts)
    ]


def generate(engine, sampling: Sampling = SAMPLING, num_prompts: int = 20, policy_version: int = 0) -> list[Rollout]:
    requests = [(prompt, 0, 1000 + prompt.index) for prompt in make_prompts(num_prompts)]
    return in_order(engine.generate(requests, sampling, policy_version))


def reference_events(path, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """(event log-probabilities float64 [T, NUM_IDS], event of each response token), by no engine's code."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    sequence = torch.tensor(np.concatenate([rollout.prompt.token_ids, rollout.response_ids]).astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=sequence[None]).logits[0, len(rollout.prompt.token_ids) - 1 : -1, :NUM_IDS].double()
    probs = logits.softmax(-1)
    first, second = VOCABULARY.stop_ids
    probs[:, first] += probs[:, second]
    probs[:, second] = 0.0
    events = np.where(rollout.response_ids == second, first, rollout.response_ids)
    return probs.log().numpy(), events


def expect_top(ids: np.ndarray, logprobs: np.ndarray, reference: np.ndarray, num_kept: int) -> None:
    """The `num_kept` likeliest events of the reference, in order, then empty slots."""
    num_events = NUM_IDS - 1  # two stop ids are one event
    shown = min(num_kept, num_events)
    assert ids.shape == (len(reference), num_kept)
    np.testing.assert_allclose(logprobs[:, :shown], -np.sort(-reference, axis=1)[:, :shown], **CLOSE)
    np.testing.assert_allclose(np.take_along_axis(reference, ids[:, :shown], axis=1), logprobs[:, :shown], **CLOSE)
    assert all(len(set(row)) == shown for row in ids[:, :shown].tolist())
    assert np.all(ids[:, shown:] == -1) and np.all(logprobs[:, shown:] == -np.inf)


def expect_candidates(scores: TeacherScores, rollout: Rollout, reference: np.ndarray) -> None:
    """The reference at the student's candidates, nothing in an empty slot."""
    named = rollout.candidate_ids >= 0
    expected = np.where(named, np.take_along_axis(reference, np.maximum(rollout.candidate_ids, 0), axis=1), -np.inf)
    np.testing.assert_allclose(scores.candidate_logprobs, expected, **CLOSE)
