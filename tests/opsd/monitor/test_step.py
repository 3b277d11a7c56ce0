"""A step's numbers: what they count, and what is said where there is nothing to count."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from opsd.batch import batch_stats, held_here
from opsd.monitor.log import PHASES
from opsd.monitor.step import StepRecord, staleness, step_metrics, token_rows
from opsd.types import ScoredRollout, Selection, StepReport, Vocabulary
from tests.opsd.builders import scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))


def record_of(items, step):
    """A step in which every other token is kept, and two rollouts were left out."""
    scored = replace(held_here(items, VOCABULARY), dropped=Counter(foreign_token=0, nan_score=2))
    kept = torch.arange(0, scored.num_tokens, 2)
    return StepRecord(
        batch=batch_stats(step, scored, scored.tokens, None, num_steps=100),
        scored=scored,
        selection=Selection(index_N=kept, weight_N=torch.ones(len(kept))),
        report=StepReport(loss=0.5, grad_norm=1.0, learning_rate=1e-6, num_kept=len(kept), num_trunk_tokens=12),
        queue={"queue/rollouts": 3},
        graded={"grader_timeouts": 1},
    )


def metrics_of(policy_versions, step):
    """step_metrics of rollouts of 4 tokens each, written at these versions."""
    items = [
        ScoredRollout(rollout=replace(item.rollout, policy_version=version), scores=item.scores)
        for item, version in zip(scored_rollouts([4] * len(policy_versions), VOCABULARY), policy_versions, strict=True)
    ]
    phase_s = {**dict.fromkeys(PHASES, 0.0), "rollout": 1.5, "learn": 0.5, "evaluate": 100.0}
    return step_metrics(record_of(items, step), phase_s, weight_version=step + 1)


def test_staleness_is_counted_from_the_weights_that_wrote_each_answer():
    values = metrics_of([7, 7, 4, 6], step=7)
    assert (values["staleness"], values["staleness_max"]) == (1.0, 3)
    assert values["weight_version"] == 8


def test_an_answer_under_several_weights_counts_by_its_tokens():
    [first, second] = scored_rollouts([4, 8], VOCABULARY)
    versions = np.array([5, 5, 5, 5, 6, 6, 7, 7], np.int32)
    mixed = replace(second.rollout, policy_version=5, token_versions=versions)
    whole = replace(first.rollout, policy_version=7)
    values = staleness(8, [whole, mixed])
    assert values == {"staleness": (4 * 1 + 4 * 3 + 2 * 2 + 2 * 1) / 12, "staleness_max": 3, "mixed_versions": 0.5}
    assert staleness(8, [whole, replace(whole, policy_version=-1)])["mixed_versions"] == 0.0


def test_answers_that_the_student_did_not_write_have_no_staleness():
    assert metrics_of([5, -1], step=7)["staleness"] == 2.0
    values = metrics_of([-1, -1], step=7)
    assert values["staleness"] is values["staleness_max"] is values["mixed_versions"] is None


def test_speed_is_of_the_training_phases_and_drops_are_summed():
    values = metrics_of([0, 0], step=0)
    assert values["tokens_per_s"] == 8 / 2.0
    assert (values["dropped"], values["dropped/nan_score"], values["dropped/foreign_token"]) == (2, 2, 0)
    assert values["kept_ratio"] == 0.5
    assert (values["queue/rollouts"], values["grader_timeouts"]) == (3, 1)


def test_the_mass_that_the_models_are_compared_on_is_its_mean():
    scored = held_here(scored_rollouts([4, 4], VOCABULARY), VOCABULARY)
    expected = scored.tokens.named_mass_T.mean().item()
    assert 0.0 < expected < 0.99
    assert abs(metrics_of([0, 0], step=0)["named_mass"] - expected) < 1e-7


def test_the_token_view_shows_each_rollout_with_its_own_tokens():
    record = record_of(scored_rollouts([3, 5, 2], VOCABULARY), step=4)
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    first, second = token_rows(record, 2, tokenizer)
    assert (first["step"], len(first["tokens"]), len(second["tokens"])) == (5, 3, 5)
    assert second["tokens"] == [f"<{token}>" for token in record.scored.rollouts[1].response_ids.tolist()]
    assert second["entropy"] == [round(value, 5) for value in record.batch.tokens.entropy_T[3:8].tolist()]
    assert (first["weight"], second["weight"]) == ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0])
