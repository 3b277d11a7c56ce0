"""A user's functions that return the wrong thing: one line before anything starts, and again at the real call."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from opsd.config.run import DataConfig, LossConfig, RunConfig
from opsd.errors import ConfigError, StageError
from opsd.hook_checks import check_hooks, checked_select, checked_source, made_up_batch
from opsd.hooks import TrainHooks, build_hooks
from opsd.ops.losses.divergences import DIVERGENCES, reverse_kl
from opsd.ops.losses.objective import OBJECTIVES, Objective
from opsd.ops.losses.terms import TERMS
from opsd.types import Selection, Vocabulary
from tests.opsd.builders import scored_rollouts


def mean_of_all(student_NB, teacher_NB):
    return reverse_kl(student_NB, teacher_NB).mean()


def of_each_bucket(student_NB, teacher_NB):
    return student_NB.exp() * (student_NB - teacher_NB)


def without_a_gradient(student_NB, teacher_NB):
    return reverse_kl(student_NB, teacher_NB).detach()


def naive(student_NB, teacher_NB):
    return (student_NB.exp() * (student_NB - teacher_NB)).sum(1)


def as_array(student_NB, teacher_NB):
    return reverse_kl(student_NB, teacher_NB).detach().numpy()


def whole_numbers(student_NB, teacher_NB):
    return reverse_kl(student_NB, teacher_NB).long()


@pytest.mark.parametrize(
    ("divergence", "message"),
    [
        (mean_of_all, r"mean_of_all must return one value a row, a tensor of shape \(8,\), got shape \(\)"),
        (of_each_bucket, r"of_each_bucket must return one value a row, .*\(8,\), got shape \(8, 5\)"),
        (as_array, "as_array must return one value a row, .* got ndarray"),
        (whole_numbers, "whole_numbers must return one value a row, .* got torch.int64"),
        (without_a_gradient, "without_a_gradient must depend on the student's log-probabilities"),
        (naive, "naive must have a finite value also where a slot holds no token .* got nan"),
    ],
)
def test_a_divergence_that_returns_something_else_is_refused_before_the_run(divergence, message):
    with pytest.raises(ConfigError, match=f"the loss: tests.opsd.test_hook_checks.{message}"):
        check_hooks(TrainHooks(divergence=divergence), RunConfig())


def test_a_term_is_looked_at_like_a_divergence(monkeypatch):
    monkeypatch.setitem(TERMS, "mine", mean_of_all)
    hooks = build_hooks(RunConfig(loss=LossConfig(terms={"mine": {"weight": 0.1}})))
    with pytest.raises(ConfigError, match=r"mean_of_all must return one value a row, .* got shape \(\)"):
        check_hooks(hooks, RunConfig())


def test_the_real_call_is_looked_at_too():
    """A function may do well on eight rows of five buckets and not on others."""
    rows = torch.randn(2, 3, 4, dtype=torch.float64).log_softmax(-1)
    with pytest.raises(ConfigError, match=r"mean_of_all must return one value a row, a tensor of shape \(3,\)"):
        Objective.of(mean_of_all)(*rows)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (LossConfig(divergence="abkd", options={"alpha": 0.0}), r"abkd\(alpha=0.0\): alpha and beta must be > 0"),
        (LossConfig(divergence="jsd", options={"beta": 1.5}), r"jsd\(beta=1.5\): beta must be in \[0, 1\], got 1.5"),
        (
            LossConfig(terms={"dac_kl": {"weight": 1.0, "low": 0.9, "high": 0.1}}),
            r"dac_kl\(low=0.9, high=0.1\): need 0 <= low < high <= 1",
        ),
        (LossConfig(divergence="kdrl"), "the loss needs advantage_N, which the selection does not give"),
    ],
)
def test_options_out_of_range_are_found_before_the_run(loss, message):
    with pytest.raises(ConfigError, match=message):
        check_hooks(build_hooks(RunConfig(loss=loss)), RunConfig())


@pytest.mark.parametrize("name", sorted({*DIVERGENCES, *TERMS, *OBJECTIVES}))
def test_every_function_of_ours_passes(name):
    function = {**DIVERGENCES, **TERMS, **OBJECTIVES}[name]
    inputs = {"advantage_N": torch.ones(8), "wrong_N": torch.ones(8).bool(), "reverse_share_N": torch.ones(8)}

    def select(batch):
        return Selection(index_N=torch.arange(8), weight_N=torch.ones(8), inputs=inputs)

    check_hooks(TrainHooks(divergence=function, select=select), RunConfig(data=DataConfig(grader="math")))


def test_nothing_is_drawn_that_the_run_would_notice():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    hooks = TrainHooks(
        divergence=reverse_kl,
        select=lambda batch: Selection(index_N=torch.arange(8), weight_N=torch.rand(8)),
    )
    check_hooks(hooks, RunConfig())
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        (lambda batch: torch.arange(3), ConfigError, "must return a Selection, got Tensor"),
        (lambda batch: Selection(index_N=torch.tensor([9]), weight_N=torch.ones(1)), ConfigError, "got place 9"),
        (lambda batch: Selection(index_N=torch.tensor([0]), weight_N=torch.zeros(1)), StageError, "no token of step 0"),
        (lambda batch: Selection(index_N=torch.tensor([2, 0]), weight_N=torch.ones(2)), ConfigError, "got 2 before 0"),
    ],
)
def test_a_select_of_the_users_own_is_looked_at_at_every_call(selection, error, message):
    for batch in (made_up_batch(RunConfig()), made_up_batch(RunConfig(stats="learner"))):
        with pytest.raises(error, match=f"select: tests.opsd.test_hook_checks.*{message}"):
            checked_select(selection, batch)


def test_a_threshold_that_no_made_up_token_passes_is_no_reason_to_refuse_the_run():
    def far(batch):
        index_N = (batch.tokens.reverse_kl_T > 5.0).nonzero()[:, 0]
        return Selection(index_N=index_N, weight_N=torch.ones(len(index_N)))

    check_hooks(TrainHooks(divergence=reverse_kl, select=far), RunConfig())
    with pytest.raises(ConfigError, match="mean_of_all must return one value a row"):
        check_hooks(TrainHooks(divergence=mean_of_all, select=far), RunConfig())


def test_a_temperature_of_zero_is_no_temperature():
    with pytest.raises(ValueError, match="temperature_N must be finite and above 0, got 0.0 at place 1 of 2"):
        Selection(index_N=torch.arange(2), weight_N=torch.ones(2), temperature_N=torch.tensor([1.0, 0.0]))


def test_groups_of_answers_are_looked_at_as_they_come():
    first, second = (item.rollout for item in scored_rollouts([2, 3], Vocabulary(size=20, stop_ids=(0,))))

    def run(groups):
        return list(checked_source(lambda prompts, **rest: groups, "mine")([], samples_per_prompt=1, step=4))

    assert run([{1: second}, {0: first}]) == [{1: second}, {0: first}]
    with pytest.raises(ConfigError, match=r"mine must give groups \{place: Rollout\}, got list in step 4"):
        run([[first]])
    with pytest.raises(ConfigError, match=r"mine must give groups \{place: Rollout\}, got dict in step 4"):
        run([{0: replace(first).response_ids}])
    with pytest.raises(ConfigError, match="mine must give every place once, got place 0 twice in step 4"):
        run([{0: first}, {0: second}])
    with pytest.raises(ConfigError, match="mine must return a function of prompts, got NoneType"):
        checked_source(None, "mine")


def test_the_source_of_the_answers_is_asked_for_before_there_are_pools():
    def out_of_range(rollout_pool, teacher_pool):
        raise ConfigError("answer_options.student_share must be in [0, 1], got 2.0")

    for rollouts, message in ((out_of_range, "got 2.0"), (lambda *pools: [], "must return a function of prompts")):
        with pytest.raises(ConfigError, match=message):
            check_hooks(TrainHooks(divergence=reverse_kl, rollouts=rollouts), RunConfig())
    check_hooks(TrainHooks(divergence=reverse_kl, rollouts=lambda pool, teacher: pool.engines.sample), RunConfig())


def test_a_bound_function_is_named_with_its_options():
    hooks = TrainHooks(divergence=partial(mean_of_all))
    with pytest.raises(ConfigError, match="tests.opsd.test_hook_checks.mean_of_all must"):
        check_hooks(hooks, RunConfig())
    assert np.isfinite(made_up_batch(RunConfig()).tokens.entropy_T.numpy()).all()
