"""A method in a module of the user's own, with no edit here: what README shows, and a loss with an input."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opsd.config.loss import LossConfig
from opsd.config.run import DataConfig, RunConfig
from opsd.data.grading import judge_all
from opsd.errors import ConfigError
from opsd.hook_checks import check_hooks
from opsd.hooks import load_build_hooks
from opsd.ops.losses.divergences import DIVERGENCES
from opsd.ops.losses.objective import Objective
from opsd.ops.losses.table import LOSSES
from opsd.ops.signals import STATISTICS, hellinger
from tests.tip.batches import keep_all, make_batch
from tip import adjustments, filters, scores
from tip.adjustments import ADJUSTMENTS
from tip.config import SelectorConfig, TipRunConfig
from tip.plugin import asked_statistics, build_hooks
from tip.selectors import SELECTORS

README = Path(__file__).resolve().parents[2] / "README.md"
TABLES = (
    scores.SCORES, scores.READS, filters.FILTERS, filters.READS, ADJUSTMENTS, adjustments.READS, SELECTORS, DIVERGENCES,
    LOSSES.maps[0], STATISTICS,
)  # fmt: skip

WITH_A_ROW_INPUT = """
import torch

from opsd.ops.losses.objective import Loss
from opsd.ops.losses.table import LOSSES
from tip.adjustments import ADJUSTMENTS, with_input
from tip.plugin import build_hooks


def patience(batch, selection, *, rate=1.0):
    return with_input(selection, "patience_N", torch.exp(-rate * batch.position_T[selection.index_N].float()))


def patient_kl(student_logprobs_NB, teacher_logprobs_NB, *, patience_N, power=1.0):
    gap_NB = (student_logprobs_NB.exp() - teacher_logprobs_NB.exp()).abs()
    return patience_N * gap_NB.sum(1) ** power


ADJUSTMENTS["patience"] = patience
LOSSES["patient_kl"] = Loss(patient_kl, inputs=("patience_N",))
"""


@pytest.fixture(autouse=True)
def tables_as_they_were():
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module where a run looks for it; returns its build_hooks, as `hooks=` names it."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return load_build_hooks(f"{name}:build_hooks")

    yield write
    for name in written:
        sys.modules.pop(name, None)


def readme_module(name):
    [block] = re.findall(rf"```python\n(# {name}\.py.*?)```", README.read_text(), re.DOTALL)
    return block


def test_the_method_that_readme_shows(module):
    build = module("my_method", readme_module("my_method"))
    cfg = TipRunConfig(
        hooks="my_method:build_hooks",
        data=DataConfig(grader="my_method:after_hash"),
        loss=LossConfig(divergence="total_variation", options={"power": 2}),
        selector=SelectorConfig(score="surprise", name="above_mean"),
    )
    hooks = build(cfg)
    check_hooks(hooks, cfg)
    assert hooks.statistics["teacher_best"] is STATISTICS["teacher_best"]
    batch = make_batch((3, 4))
    best_T = torch.linspace(-2.0, 0.0, 7)
    tokens = replace(batch.tokens, extra={"teacher_best": best_T})
    score_T = tokens.reverse_kl_T * (1 - tokens.entropy_T) * best_T.exp()
    kept = hooks.select(replace(batch, tokens=tokens)).index_N
    assert kept.tolist() == (score_T >= score_T.mean()).nonzero()[:, 0].tolist()
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert hooks.divergence(student, teacher).item() == pytest.approx(0.16)
    judged = judge_all([cfg.data.grader] * 2, ["1 #7", "7"], ["7", "8"])
    assert [judgement.right for judgement in judged] == [True, False]


def test_the_hooks_that_readme_shows_take_their_options(module):
    build = module("my_hooks", readme_module("my_hooks"))
    cfg = RunConfig(hooks="my_hooks:build_hooks", hook_options={"first": 2})
    hooks = build(cfg)
    check_hooks(hooks, cfg)
    assert hooks.select(make_batch((3, 1, 4))).index_N.tolist() == [0, 1, 3, 4, 5]


def test_a_loss_with_a_row_input_of_ones_own(module):
    build = module("my_loss", WITH_A_ROW_INPUT)
    loss = LossConfig(divergence="patient_kl", options={"power": 2.0})
    cfg = TipRunConfig(loss=loss, selector=SelectorConfig(name="all"), adjust={"patience": {"rate": 0.5}})
    hooks = build(cfg)
    check_hooks(hooks, cfg)
    selection = hooks.select(make_batch((2, 1)))
    student, teacher = torch.tensor([[0.5, 0.5]] * 3).log(), torch.tensor([[0.9, 0.1]] * 3).log()
    objective = Objective.of(hooks.divergence)
    assert objective.inputs == {"patience_N"}
    expected = 0.8**2 * torch.tensor([0.0, -0.5, 0.0]).exp()  # places 0 and 1 of a response, and 0 of the next
    torch.testing.assert_close(objective(student, teacher, **selection.inputs), expected)
    for change, message in (
        ({"adjust": {}}, "the loss needs patience_N, which no entry of `adjust` gives"),
        ({"loss": replace(loss, options={"powr": 2})}, "loss.options: 'patient_kl' takes power, got powr"),
        ({"loss": replace(loss, options={"patience_N": 2})}, "loss.options: 'patient_kl' takes power, got patience_N"),
        ({"adjust": {"patience": {"rate": "slow"}}}, "adjust.patience.rate must be a number, got 'slow'"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_hooks(build(replace(cfg, **change)), replace(cfg, **change))


def test_an_input_that_no_entry_states_is_asked_for_as_an_option():
    def mine(student_logprobs_NB, teacher_logprobs_NB, *, advantage_N):
        return advantage_N

    LOSSES["mine"] = mine
    with pytest.raises(ConfigError, match="loss.options: 'mine' needs advantage_N"):
        build_hooks(TipRunConfig(loss=LossConfig(divergence="mine")))


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, set()),
        ({"selector": SelectorConfig(score="hellinger")}, {"hellinger_T"}),
        ({"adjust": {"temperature": {}}, "filters": {"fire": {}}}, {"hellinger_T"}),
        (
            {"selector": SelectorConfig(score="grad_norm"), "adjust": {"temperature": {}}},
            {"hellinger_T", "grad_norm_T"},
        ),
        (
            {"selector": SelectorConfig(score="entropy_or_ier"), "adjust": {"select_kd": {}}},
            {"ier_T", "teacher_rank_T"},
        ),
        ({"selector": SelectorConfig(score="mine")}, {*STATISTICS, "mine_T"}),
        ({"selector": SelectorConfig(score="said")}, {"mine_T"}),
    ],
)
def test_a_run_computes_what_its_functions_read(settings, asked):
    STATISTICS["mine_T"] = hellinger
    scores.READS["said"] = ("entropy_T", "mine_T")
    assert asked_statistics(TipRunConfig(**settings)).keys() == asked


def test_every_filter_and_adjustment_says_what_it_reads():
    assert filters.READS.keys() == filters.FILTERS.keys() and adjustments.READS.keys() == ADJUSTMENTS.keys()


FACTS = {
    "prompt_R": torch.tensor([7, 7, 2, 2]),
    "sample_R": torch.tensor([0, 0, 0, 0]),
    "reward_R": torch.tensor([1.0, 0.0, 0.0, 1.0]),
    "on_policy_R": torch.tensor([False, True, False, True]),
}


@pytest.mark.parametrize("name", [*filters.FILTERS, *ADJUSTMENTS])
def test_a_filter_or_adjustment_reads_what_it_says(name):
    """Other numbers in a statistic change what it gives where READS has it, and only there. (`fire` is one of each.)"""
    batch, others = (make_batch((30, 20, 44, 10), seed=seed, **FACTS) for seed in (0, 1))

    def outcomes(tokens):
        changed = replace(batch, tokens=tokens)
        if name in filters.FILTERS:
            options = {"start": 4, "end": 9} if name == "horizon" else {"drop": 0.5}
            yield filters.FILTERS[name](changed, **options)
        if name in ADJUSTMENTS:
            selection = ADJUSTMENTS[name](changed, keep_all(changed))
            yield from (selection.weight_N, *selection.inputs.values())
            yield from () if selection.temperature_N is None else (selection.temperature_N,)

    def with_other(statistic):
        if statistic in batch.tokens.extra:
            return replace(batch.tokens, extra={**batch.tokens.extra, statistic: others.tokens.extra[statistic]})
        return replace(batch.tokens, **{statistic: getattr(others.tokens, statistic)})

    reads = {*filters.READS.get(name, ()), *adjustments.READS.get(name, ())}
    for statistic in batch.tokens.known():
        pairs = zip(outcomes(batch.tokens), outcomes(with_other(statistic)), strict=True)
        assert any(not torch.equal(*pair) for pair in pairs) == (statistic in reads), statistic
