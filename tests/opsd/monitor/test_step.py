"""A step's numbers: what they count, and what is said where there is nothing to count."""

from collections import Counter
from dataclasses import replace

import torch

from opsd.batch import batch_stats, rollout_stats
from opsd.monitor.log import PHASES
from opsd.monitor.step import step_metrics
from opsd.types import ScoredRollout, Selection, StepReport, Vocabulary
from tests.opsd.builders import scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))


def metrics_of(policy_versions, step):
    """step_metrics of rollouts of 4 tokens each, written at these versions, of which every other token is kept."""
    scored = [
        ScoredRollout(rollout=replace(item.rollout, policy_version=version), scores=item.scores)
        for item, version in zip(scored_rollouts([4] * len(policy_versions), VOCABULARY), policy_versions, strict=True)
    ]
    batch = batch_stats(step, scored, rollout_stats(scored, VOCABULARY), None, num_steps=100)
    kept = torch.arange(0, len(batch.tokens), 2)
    return step_metrics(
        batch,
        scored,
        Selection(index_N=kept, weight_N=torch.ones(len(kept))),
        StepReport(loss=0.5, grad_norm=1.0, learning_rate=1e-6, num_kept=len(kept), num_trunk_tokens=12),
        Counter(foreign_token=0, nan_score=2),
        {**dict.fromkeys(PHASES, 0.0), "rollout": 1.5, "learn": 0.5, "evaluate": 100.0},
        weight_version=step + 1,
    )


def test_staleness_is_counted_from_the_weights_that_wrote_each_answer():
    values = metrics_of([7, 7, 4, 6], step=7)
    assert (values["staleness"], values["staleness_max"]) == (1.0, 3)
    assert values["weight_version"] == 8


def test_answers_that_the_student_did_not_write_have_no_staleness():
    assert metrics_of([5, -1], step=7)["staleness"] == 2.0
    values = metrics_of([-1, -1], step=7)
    assert values["staleness"] is None and values["staleness_max"] is None


def test_speed_is_of_the_training_phases_and_drops_are_summed():
    values = metrics_of([0, 0], step=0)
    assert values["tokens_per_s"] == 8 / 2.0
    assert (values["dropped"], values["dropped/nan_score"], values["dropped/foreign_token"]) == (2, 2, 0)
    assert values["kept_ratio"] == 0.5


def test_the_mass_that_the_models_are_compared_on_is_its_mean():
    scored = scored_rollouts([4, 4], VOCABULARY)
    expected = rollout_stats(scored, VOCABULARY).named_mass_T.mean().item()
    assert 0.0 < expected < 0.99
    assert abs(metrics_of([0, 0], step=0)["named_mass"] - expected) < 1e-7
