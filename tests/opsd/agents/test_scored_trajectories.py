"""Trajectories of a real engine and their scores, against plain forward passes over the same ids."""
# R tokens of a whole response, T the student's of them, V vocabulary

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.opsd.agents.sampled import VOCABULARY, make_engine, scored_by


def event_logprobs(path, rollout):
    """float64 [R, V]: of the distributions that predict each token of the response, the stops as one event."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    ids = np.concatenate([rollout.prompt.token_ids, rollout.trajectory.read_ids]).astype(np.int64)
    with torch.inference_mode():
        logits_RV = model(torch.from_numpy(ids)[None]).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    logprobs_RV = logits_RV[:, : VOCABULARY.size].log_softmax(1)
    stops = list(VOCABULARY.stop_ids)
    logprobs_RV[:, VOCABULARY.stop_event] = logprobs_RV[:, stops].logsumexp(1)
    return logprobs_RV


def events(token_ids):
    return np.where(np.isin(token_ids, VOCABULARY.stop_ids), VOCABULARY.stop_event, token_ids)


def with_tools(rollouts):
    return [rollout for rollout in rollouts.values() if rollout.trajectory.num_turns > 1]


def test_the_tokens_do_not_depend_on_what_runs_beside_them(sampled):
    few, many = sampled
    assert list(few) == list(many) == list(range(16)) and len(with_tools(few)) > 4
    for one, other in zip(few.values(), many.values(), strict=True):
        assert one.trajectory.read_ids.tolist() == other.trajectory.read_ids.tolist()
        assert one.trajectory.place_T.tolist() == other.trajectory.place_T.tolist()


def test_what_the_student_wrote_has_the_log_probabilities_of_a_plain_forward_pass(sampled, paths):
    for rollout in with_tools(sampled[0]):
        place_T = rollout.trajectory.place_T
        expected_TV = event_logprobs(paths[0], rollout)[place_T]
        expected_T = expected_TV[np.arange(len(rollout)), events(rollout.response_ids)]
        np.testing.assert_allclose(rollout.sampled_logprobs, expected_T, atol=1e-4)


def test_the_teacher_scores_the_students_tokens_after_all_that_stands_before_them(sampled, paths):
    rollouts = list(sampled[0].values())
    told, rows = scored_by(make_engine(paths[1]), rollouts)
    teachers, hidden_rows = [], []
    for rollout in rollouts:
        place_T = rollout.trajectory.place_T
        expected_TV = event_logprobs(paths[1], rollout)[place_T]
        teachers.append(expected_TV[np.arange(len(rollout)), events(rollout.response_ids)])
        hidden_rows.append(len(rollout.prompt.token_ids) + place_T - 1)
    np.testing.assert_allclose(told.stats["teacher_logprob_T"], np.concatenate(teachers), atol=1e-4)
    assert len(told.stats["reverse_kl_T"]) == sum(map(len, rollouts))
    np.testing.assert_array_equal(rows.row_N, np.concatenate(hidden_rows))
    start_S = np.cumsum(rows.length_S) - rows.length_S
    for rollout, start, length in zip(rollouts, start_S, rows.length_S, strict=True):
        sequence = np.concatenate([rollout.prompt.token_ids, rollout.trajectory.read_ids])
        np.testing.assert_array_equal(rows.token_ids_L[start : start + length], sequence[:length])


class Perturbed:
    """An engine whose scores of tools' tokens are anything at all."""

    def __init__(self, engine, rollouts):
        self.engine, self.vocabulary = engine, engine.vocabulary
        self.own = {id_of(rollout): set(rollout.trajectory.place_T.tolist()) for rollout in rollouts}

    def score(self, rollouts, top_k):
        found = self.engine.score(rollouts, top_k)
        for rollout, scores in zip(rollouts, found, strict=True):
            tools = [row for row in range(len(rollout)) if row not in self.own[id_of(rollout)]]
            scores.top_logprobs[tools], scores.sampled_logprobs[tools], scores.entropy[tools] = np.nan, -7.0, 99.0
        return found


def id_of(rollout):
    return rollout.prompt.index


def test_what_is_said_of_tools_tokens_changes_nothing(sampled, paths):
    rollouts, engine = list(sampled[0].values()), make_engine(paths[1])
    (told, rows), (other_told, other_rows) = (
        scored_by(each, rollouts) for each in (engine, Perturbed(engine, rollouts))
    )
    assert told.missing == other_told.missing == {} and told.stats.keys() == other_told.stats.keys()
    for name, values in told.stats.items():
        np.testing.assert_array_equal(values, other_told.stats[name], err_msg=name)
    for name, values in vars(rows).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(values, vars(other_rows)[name], err_msg=name)
