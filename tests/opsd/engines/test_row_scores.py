"""Scores of rows against the dense distribution in float64, and the rows that a vLLM worker takes them from."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opsd.engines import row_scores
from opsd.engines.logits import top_events
from opsd.engines.row_scores import score_rows, teacher_scores
from opsd.engines.vllm_rows import ResponseRows
from opsd.types import Prompt, Rollout, Vocabulary

WIDTH, NUM_IDS = 8, 700  # wide enough for the search in groups
VOCABULARY = Vocabulary(size=NUM_IDS, stop_ids=(2, 650), foreign_ids=(5, 9))
HEAD = torch.randn(NUM_IDS + 20, WIDTH, generator=torch.Generator().manual_seed(0))  # 20 padded ids
CLOSE = {"atol": 1e-5, "rtol": 0}


def rollout_of(num_prompt_tokens: int, num_tokens: int, seed: int, num_candidates: int = 4) -> Rollout:
    rng = np.random.default_rng(seed)
    response = rng.integers(10, NUM_IDS, num_tokens).astype(np.int32)
    response[-1] = 650
    candidates = np.stack([rng.permutation(np.r_[2, 10:650])[:num_candidates] for _ in range(num_tokens)])
    candidates[0, 0], candidates[0, 1], candidates[-1, -1] = 2, 17, -1
    return Rollout(
        prompt=Prompt(index=0, token_ids=np.arange(num_prompt_tokens), text="", answer=None, source="t"),
        sample=0,
        response_ids=response,
        sampled_logprobs=np.zeros(num_tokens, np.float32),
        candidate_ids=candidates.astype(np.int32),
        candidate_logprobs=np.zeros(candidates.shape, np.float32),
        stopped=True,
        policy_version=0,
    )


def hidden_of(rollout: Rollout, seed: int) -> torch.Tensor:
    """[prompt and response tokens, D]."""
    num_rows = len(rollout.prompt.token_ids) + len(rollout)
    return 2.0 * torch.randn(num_rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def dense(hidden: torch.Tensor) -> np.ndarray:
    """float64 [T, NUM_IDS] log-probabilities of events; -inf at what is none."""
    logits = (hidden.double() @ HEAD.double().T)[:, :NUM_IDS]
    logits[:, list(VOCABULARY.foreign_ids)] = -torch.inf
    merged = logits[:, list(VOCABULARY.stop_ids)].logsumexp(1)
    logits[:, 650], logits[:, 2] = -torch.inf, merged
    return logits.log_softmax(1).numpy()


def expect_scores(scores, rollout: Rollout, hidden: torch.Tensor, top_k: int) -> None:
    first = len(rollout.prompt.token_ids) - 1
    reference = dense(hidden[first : first + len(rollout)])
    np.testing.assert_allclose(scores.top_logprobs, -np.sort(-reference, axis=1)[:, :top_k], **CLOSE)
    np.testing.assert_allclose(np.take_along_axis(reference, scores.top_ids, axis=1), scores.top_logprobs, **CLOSE)
    events = np.where(rollout.response_ids == 650, 2, rollout.response_ids)
    np.testing.assert_allclose(scores.sampled_logprobs, reference[np.arange(len(events)), events], **CLOSE)
    named = rollout.candidate_ids >= 0
    expected = np.where(named, np.take_along_axis(reference, np.maximum(rollout.candidate_ids, 0), 1), -np.inf)
    np.testing.assert_allclose(scores.candidate_logprobs, expected, **CLOSE)
    entropy = -(np.exp(reference) * np.where(np.isneginf(reference), 0.0, reference)).sum(axis=1)
    np.testing.assert_allclose(scores.entropy, entropy, **CLOSE)


@pytest.mark.parametrize("rows_at_once", [1, 4, 1000])
def test_scores_equal_the_dense_distribution_in_any_chunks(monkeypatch, rows_at_once):
    monkeypatch.setitem(row_scores.CHUNK_BYTES, "cpu", rows_at_once * 4 * NUM_IDS)
    rollout = rollout_of(3, 9, seed=1)
    hidden, most = hidden_of(rollout, seed=2), []

    def logits_of(part):
        most.append(len(part))
        return part @ HEAD.T

    rows = score_rows(hidden[2:11], logits_of, [(rollout, slice(0, 9))], top_k=6, vocabulary=VOCABULARY)
    expect_scores(teacher_scores([rows], num_candidates=4), rollout, hidden, top_k=6)
    assert max(most) <= rows_at_once
    assert teacher_scores([rows], num_candidates=None).candidate_logprobs is None


def test_more_events_than_there_are_leave_empty_slots():
    rollout = rollout_of(3, 2, seed=1)
    hidden = hidden_of(rollout, seed=2)
    rows = score_rows(hidden[2:4], lambda h: h @ HEAD.T, [(rollout, slice(0, 2))], top_k=NUM_IDS, vocabulary=VOCABULARY)
    num_events = NUM_IDS - 3  # two foreign ids, and a second stop id
    assert (rows.top_ids[:, num_events:] == -1).all() and (rows.top_logprobs[:, num_events:] == -torch.inf).all()
    assert (rows.top_ids[:, :num_events] >= 0).all() and rows.top_logprobs[:, :num_events].isfinite().all()


def test_a_teacher_that_is_no_number_is_seen():
    rollout = rollout_of(3, 3, seed=1)
    hidden = hidden_of(rollout, seed=2)
    hidden[3] = torch.nan
    rows = score_rows(hidden[2:5], lambda h: h @ HEAD.T, [(rollout, slice(0, 3))], top_k=6, vocabulary=VOCABULARY)
    assert teacher_scores([rows], num_candidates=4).has_nan()


@pytest.mark.parametrize(("width", "num_kept"), [(700, 2), (64 * 40, 9), (64 * 40 + 63, 9), (50, 9), (700, 600)])
def test_the_search_in_groups_finds_the_likeliest(width, num_kept):
    """Also where the largest lie close together, or behind the last whole group."""
    values = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    values[:10] = values[:10].sort(dim=1, descending=True).values
    values[10:20] = values[10:20].sort(dim=1).values
    ids, found = top_events(values, num_kept)
    expected = values.topk(min(num_kept, width)).values
    assert torch.equal(found[:, : expected.shape[1]], expected)
    assert torch.equal(values.gather(1, ids[:, : expected.shape[1]].long()), expected)


class Runner:
    """vLLM's, as far as ResponseRows looks: sequences lie one behind the other in a step's hidden states."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden @ HEAD.T)
        self.requests, self.input_batch, self.query_start_loc = {}, None, None
        self.own_calls = 0

    def _get_prompt_logprobs_dict(self, hidden_states, num_scheduled_tokens):
        self.own_calls += 1
        return {"own": len(hidden_states)}

    def step(self, parts: dict[str, tuple[int, torch.Tensor]]):
        """parts: name -> (tokens computed before, hidden states of the step's tokens)."""
        names = list(parts)
        lengths = [len(hidden) for _, hidden in parts.values()]
        self.requests = {name: SimpleNamespace(num_computed_tokens=done) for name, (done, _) in parts.items()}
        self.input_batch = SimpleNamespace(req_id_to_index={name: place for place, name in enumerate(names)})
        self.query_start_loc = SimpleNamespace(np=np.cumsum([0, *lengths]))
        hidden_states = torch.cat([hidden for _, hidden in parts.values()])
        return self._get_prompt_logprobs_dict(hidden_states, dict(zip(names, lengths, strict=True)))


def test_rows_are_found_in_any_order_of_steps_and_again_after_a_preemption():
    rollouts = {"a": rollout_of(5, 7, seed=1), "b": rollout_of(2, 4, seed=2, num_candidates=3)}
    hidden = {name: hidden_of(rollout, seed=len(name) + 3) for name, rollout in rollouts.items()}
    runner = Runner()
    rows = ResponseRows(runner, keeps_scores=True)
    rows.expect(rollouts, 6, VOCABULARY)
    other = torch.randn(3, WIDTH)
    runner.step({"a": (0, hidden["a"][:3]), "other": (0, other)})  # of a's prompt only
    runner.step({"other": (3, other), "a": (3, hidden["a"][3:6])})
    runner.step({"a": (6, torch.zeros(3, WIDTH)), "b": (0, hidden["b"])})
    runner.step({"a": (0, hidden["a"][:8])})  # it was preempted, and begins anew
    assert runner.step({"b": (6, other[:1]), "a": (8, hidden["a"][8:])}) == {"own": 5}
    scored = rows.take()
    for name, rollout in rollouts.items():
        expect_scores(scored[name], rollout, hidden[name], top_k=6)
    assert runner.own_calls == 5
    runner.step({"a": (0, hidden["a"])})  # expected no longer
    assert rows.take() == {}


def test_a_rank_that_keeps_no_scores_still_takes_part_in_the_head():
    rollout, calls = rollout_of(5, 7, seed=1), []
    runner = Runner()
    runner.model.compute_logits = lambda hidden: calls.append(len(hidden)) or hidden @ HEAD.T
    rows = ResponseRows(runner, keeps_scores=False)
    rows.expect({"a": rollout}, 6, VOCABULARY)
    runner.step({"a": (0, hidden_of(rollout, seed=1))})
    assert rows.take() == {} and calls == [7]
