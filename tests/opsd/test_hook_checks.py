"""A user's functions that return the wrong thing: one line before anything starts, and again at the real call."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from opsd.config.loss import LossConfig
from opsd.config.placement import ScheduleConfig
from opsd.config.run import DataConfig, RunConfig
from opsd.data.grading import GRADERS
from opsd.errors import ConfigError, StageError
from opsd.hook_checks import check_hooks, checked_select, checked_source, made_up_batch
from opsd.hooks import TrainHooks, build_hooks, select_all
from opsd.ops.losses.divergences import reverse_kl
from opsd.ops.losses.objective import Objective
from opsd.ops.losses.table import LOSSES
from opsd.ops.row_function import RowFunction
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
        (mean_of_all, r"mean_of_all must return one value per row, a tensor of shape \(8,\), got shape \(\)"),
        (of_each_bucket, r"of_each_bucket must return one value per row, .*\(8,\), got shape \(8, 5\)"),
        (as_array, "as_array must return one value per row, .* got ndarray"),
        (whole_numbers, "whole_numbers must return one value per row, .* got torch.int64"),
        (without_a_gradient, "without_a_gradient must depend on the student's log-probabilities"),
        (naive, "naive must have a finite value also where a slot holds no token .* got nan"),
    ],
)
def test_a_divergence_that_returns_something_else_is_refused_before_the_run(divergence, message):
    with pytest.raises(ConfigError, match=f"the loss: tests.opsd.test_hook_checks.{message}"):
        check_hooks(TrainHooks(divergence=divergence), RunConfig())


def test_a_term_is_looked_at_like_a_divergence(monkeypatch):
    monkeypatch.setitem(LOSSES, "mine", mean_of_all)
    hooks = build_hooks(RunConfig(loss=LossConfig(terms={"mine": {"weight": 0.1}})))
    with pytest.raises(ConfigError, match=r"mean_of_all must return one value per row, .* got shape \(\)"):
        check_hooks(hooks, RunConfig())


def test_the_real_call_is_looked_at_too():
    """A function may do well on eight rows of five buckets and not on others."""
    rows = torch.randn(2, 3, 4, dtype=torch.float64).log_softmax(-1)
    with pytest.raises(StageError, match=r"mean_of_all must return one value per row, a tensor of shape \(3,\)"):
        Objective.of(mean_of_all)(*rows)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            LossConfig(divergence="abkd", options={"alpha": 0.0}),
            r"loss.options: .*abkd\(alpha=0.0\): alpha and beta must",
        ),
        (LossConfig(divergence="jsd", options={"beta": 3}), r"loss.options: .*jsd\(beta=3\): beta must be in \[0, 1\]"),
        (
            LossConfig(terms={"dac_kl": {"weight": 1.0, "low": 0.9, "high": 0.1}}),
            r"loss.terms.dac_kl: .*dac_kl\(low=0.9, high=0.1\): need 0 <= low < high <= 1",
        ),
        (
            LossConfig(terms={"sinkhorn": {"weight": 1.0, "iterations": 10**9}}),
            r"loss.terms.sinkhorn: .*iterations must be in \[1, 10000\], got 1000000000",
        ),
        (LossConfig(terms={"kendall": {"weight": 1.0, "sharpness": 0}}), "loss.terms.kendall: .*sharpness must be > 0"),
        (LossConfig(divergence="kdrl"), "the loss needs advantage_N, which the selection does not give"),
    ],
)
def test_options_out_of_range_are_found_before_the_run(loss, message):
    with pytest.raises(ConfigError, match=message):
        check_hooks(build_hooks(RunConfig(loss=loss)), RunConfig())


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_function_of_ours_passes(name):
    inputs = {"advantage_N": torch.ones(8), "wrong_N": torch.ones(8).bool(), "reverse_share_N": torch.ones(8)}

    def select(batch):
        return Selection(index_N=torch.arange(8), weight_N=torch.ones(8), inputs=inputs)

    check_hooks(TrainHooks(divergence=LOSSES[name], select=select), RunConfig(data=DataConfig(grader="math")))


def test_the_residual_passes_and_refuses_temperatures():
    """Also where a threshold leaves no made-up token: its inputs are not the selection's."""
    cfg = RunConfig(loss=LossConfig(residual=True))
    hooks = build_hooks(cfg)
    check_hooks(hooks, cfg)

    def none(batch):
        return Selection(index_N=torch.tensor([0]), weight_N=torch.zeros(1))

    check_hooks(replace(hooks, select=none), cfg)

    def tempered(batch):
        return replace(select_all(batch), temperature_N=torch.full((8,), 2.0))

    with pytest.raises(ConfigError, match="^loss.residual=true needs tokens at temperature 1, .* the selection gives"):
        check_hooks(replace(hooks, select=tempered), cfg)
    check_hooks(replace(build_hooks(RunConfig()), select=tempered), RunConfig())


@pytest.mark.parametrize("name", ["policy_gradient", "kdrl", "kdrl_advantage", "kdrl_mask"])
def test_a_loss_of_the_sampled_token_takes_older_answers_with_a_weight_alone(name):
    inputs = {"advantage_N": torch.ones(8), "wrong_N": torch.ones(8).bool()}
    hooks = TrainHooks(divergence=build_hooks(RunConfig(loss=LossConfig(divergence=name))).divergence)
    hooks = replace(hooks, select=lambda batch: replace(select_all(batch), inputs=inputs))
    stale = RunConfig(schedule=ScheduleConfig(max_staleness=1))
    with pytest.raises(ConfigError, match=f"^loss.divergence={name} learns from the sampled tokens alone, and with"):
        check_hooks(hooks, stale)
    check_hooks(hooks, RunConfig())
    weighted = build_hooks(RunConfig(loss=LossConfig(divergence=name, importance_cap=2.0))).divergence
    check_hooks(replace(hooks, divergence=weighted), stale)
    check_hooks(build_hooks(stale), stale)


def test_the_weight_of_older_answers_refuses_temperatures():
    cfg = RunConfig(loss=LossConfig(importance_cap=2.0))
    hooks = build_hooks(cfg)
    check_hooks(hooks, cfg)
    tempered = replace(hooks, select=lambda batch: replace(select_all(batch), temperature_N=torch.full((8,), 2.0)))
    with pytest.raises(ConfigError, match="^loss.importance_cap needs tokens at temperature 1"):
        check_hooks(tempered, cfg)


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
        (lambda batch: torch.arange(3), StageError, "must return a Selection, got Tensor"),
        (lambda batch: Selection(index_N=torch.tensor([9]), weight_N=torch.ones(1)), StageError, "got place 9"),
        (lambda batch: Selection(index_N=torch.tensor([0]), weight_N=torch.zeros(1)), StageError, "no token of step 0"),
        (lambda batch: Selection(index_N=torch.tensor([2, 0]), weight_N=torch.ones(2)), StageError, "got 2 before 0"),
    ],
)
def test_a_select_of_the_users_own_is_looked_at_at_every_call(selection, error, message):
    for batch in (made_up_batch(RunConfig()), made_up_batch(RunConfig(stats="learner"))):
        with pytest.raises(error, match=f"select: tests.opsd.test_hook_checks.*{message}"):
            checked_select(selection, batch)


def test_a_functions_fault_is_a_setting_s_before_the_start_and_the_stages_in_a_running_step():
    def select(batch):
        raise ValueError("share must be below 1")

    said = "select: tests.opsd.test_hook_checks.*share must be below 1"
    with pytest.raises(ConfigError, match=f"^{said}"):
        check_hooks(TrainHooks(divergence=reverse_kl, select=select), RunConfig())
    with pytest.raises(StageError, match=f"^step 7: {said}"):
        checked_select(select, replace(made_up_batch(RunConfig()), step=6))


def largest(student_NB, teacher_NB):
    return (student_NB - teacher_NB).amax(1)


def likeliest_id(student_NB, teacher_NB, *, support_NU):
    return support_NU.gather(1, student_NB[:, :-1].argmax(1, keepdim=True))[:, 0].double()


@pytest.mark.parametrize(
    ("statistic", "message"),
    [
        (mean_of_all, r"mean_of_all must return one value per row, a tensor of shape \(0,\), got shape \(\)"),
        (largest, r"largest must be finite also where a slot holds no token"),
    ],
)
def test_a_statistic_is_tried_before_the_run(statistic, message):
    hooks = TrainHooks(divergence=reverse_kl, statistics={"mine_T": statistic})
    with pytest.raises(ConfigError, match=f"the statistic mine_T: tests.opsd.test_hook_checks.{message}"):
        check_hooks(hooks, RunConfig())


def test_the_selection_is_tried_with_the_statistics_that_it_asks_for():
    seen = {}

    def select(batch):
        seen.update(batch.tokens.extra)
        return select_all(batch)

    statistics = {"distance_T": reverse_kl, "id_T": RowFunction(likeliest_id, inputs=("support_NU",))}
    check_hooks(TrainHooks(divergence=reverse_kl, statistics=statistics, select=select), RunConfig())
    assert {name: value.shape for name, value in seen.items()} == {"distance_T": (8,), "id_T": (8,)}
    assert set(seen["id_T"].tolist()) <= {0.0, 1.0, 2.0, 3.0}


def test_an_unknown_grader_and_one_without_a_verdict_are_refused(monkeypatch):
    monkeypatch.setitem(GRADERS, "mine", lambda response, answer: "yes")
    for grader, message in (
        ("maths", "data.grader must be one of final_hash, .*, auto, none or a .*, got 'maths'"),
        ("mine", "data.grader=mine must return a bool, a Judgement or a Comparison, got str"),
        ("no_such_module:grade", "data.grader=no_such_module:grade: cannot import no_such_module"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_hooks(build_hooks(RunConfig()), RunConfig(data=DataConfig(grader=grader)))


def test_a_threshold_that_no_made_up_token_passes_is_no_reason_to_refuse_the_run():
    def far(batch):
        index_N = (batch.tokens.reverse_kl_T > 5.0).nonzero()[:, 0]
        return Selection(index_N=index_N, weight_N=torch.ones(len(index_N)))

    check_hooks(TrainHooks(divergence=reverse_kl, select=far), RunConfig())
    with pytest.raises(ConfigError, match="mean_of_all must return one value per row"):
        check_hooks(TrainHooks(divergence=mean_of_all, select=far), RunConfig())


def test_a_temperature_of_zero_is_no_temperature():
    with pytest.raises(ValueError, match="temperature_N must be finite and above 0, got 0.0 at place 1 of 2"):
        Selection(index_N=torch.arange(2), weight_N=torch.ones(2), temperature_N=torch.tensor([1.0, 0.0]))


def test_groups_of_answers_are_looked_at_as_they_come():
    first, second = (item.rollout for item in scored_rollouts([2, 3], Vocabulary(size=20, stop_ids=(0,))))

    def run(groups):
        return list(checked_source(lambda prompts, **rest: groups, "mine")([], samples_per_prompt=1, step=4))

    assert run([{1: second}, {0: first}]) == [{1: second}, {0: first}]
    with pytest.raises(StageError, match=r"^rollout: step 5: mine must give groups \{place: Rollout\}, got list"):
        run([[first]])
    with pytest.raises(StageError, match=r"^rollout: step 5: mine must give groups \{place: Rollout\}, got dict"):
        run([{0: replace(first).response_ids}])
    with pytest.raises(StageError, match="^rollout: step 5: mine must give every place once, got place 0 twice"):
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
