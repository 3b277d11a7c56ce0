"""Weights, temperatures and inputs that come after the selection."""

import math
from dataclasses import replace

import pytest
import torch
from hydra.core.config_store import ConfigStore

from opsd.config.loss import LossConfig
from opsd.errors import ConfigError, StageError
from opsd.hook_checks import HookError
from opsd.learner.packing import pack_whole
from opsd.types import Vocabulary
from tests.opsd.builders import batch_of, scored_rollouts
from tests.tip.batches import keep, keep_all, make_batch
from tests.tip.test_conf import compose_tip
from tip.adaptive import inverse_difficulty_temperature
from tip.adjustments import ADJUSTMENTS
from tip.config import SelectorConfig, TipRunConfig
from tip.plugin import build_hooks

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))
LENGTHS = (3, 2, 4, 1)  # two prompts with two answers each
GROUPS = {
    "prompt_R": torch.tensor([7, 7, 2, 2]),
    "sample_R": torch.tensor([0, 0, 0, 0]),
    "reward_R": torch.tensor([1.0, 0.0, 0.0, 0.0]),
    "on_policy_R": torch.tensor([False, True, False, True]),
}


def per_token(values):
    return torch.tensor([v for v, n in zip(values, LENGTHS, strict=True) for _ in range(n)])


def test_reward_weights_are_a_softmax_within_the_prompt():
    batch = make_batch(LENGTHS, **GROUPS)
    selection = ADJUSTMENTS["reward"](batch, keep_all(batch), beta=0.5)
    right, wrong = 2 * math.exp(2) / (math.exp(2) + 1), 2 / (math.exp(2) + 1)
    torch.testing.assert_close(selection.weight_N, per_token([right, wrong, 1.0, 1.0]))


@pytest.mark.parametrize("name", ["reward", "paced", "advantage", "preference"])
def test_a_batch_that_does_not_say_which_prompt_is_told_so(name):
    batch = make_batch(LENGTHS, **{**GROUPS, "prompt_R": None})
    with pytest.raises(ValueError, match=r"needs BatchStats\.prompt_R, got None"):
        ADJUSTMENTS[name](batch, keep_all(batch))


def test_paced_drops_prompts_that_are_never_solved_and_the_learner_does_not_see_them():
    cfg = TipRunConfig(selector=SelectorConfig(name="all", ratio=1.0), adjust={"paced": {}})
    selection = build_hooks(cfg).select(make_batch(LENGTHS, **GROUPS))
    assert selection.index_N.tolist() == [0, 1, 2, 3, 4]
    torch.testing.assert_close(selection.weight_N, torch.ones(5))
    assert selection.denominator == 10.0  # all tokens of the step: half of them move the student half as far


def test_paced_learns_nothing_in_a_step_without_an_edge():
    batch = make_batch(LENGTHS, **{**GROUPS, "reward_R": torch.tensor([1.0, 1.0, 0.0, 0.0])})
    selection = ADJUSTMENTS["paced"](batch, keep_all(batch))
    assert len(selection) == 1 and selection.denominator == math.inf
    scored = batch_of(scored_rollouts(list(LENGTHS), VOCABULARY))
    whole = pack_whole(scored, selection, "teacher", VOCABULARY)
    assert whole.weight_N.tolist() == [0.0]  # a rank has a row to run, and a loss of 0


def test_a_prompt_on_the_edge_weighs_its_share_of_the_step():
    """With one denominator for all, the loss is the mean over the step of weight x loss, as in the paper."""
    batch = make_batch(LENGTHS, **{**GROUPS, "reward_R": torch.tensor([1.0, 0.0, 1.0, 1.0])})
    selection = ADJUSTMENTS["paced"](batch, keep_all(batch))
    scored = batch_of(scored_rollouts(list(LENGTHS), VOCABULARY))
    weight_N = pack_whole(scored, selection, "teacher", VOCABULARY).weight_N
    torch.testing.assert_close(weight_N, per_token([0.1, 0.1, 0.0, 0.0]).to(weight_N.dtype), rtol=1e-6, atol=0.0)


def test_fire_weighs_by_the_teachers_confidence_and_the_students_confusion():
    batch = make_batch(LENGTHS, **GROUPS)
    kept = [0, 3, 5, 8]
    selection = ADJUSTMENTS["fire"](batch, keep(batch, kept), alpha=0.5, beta=2.0)
    own, teacher = batch.tokens.entropy_T.double(), batch.tokens.teacher_entropy_T.double()
    for weight, place in zip(selection.weight_N.tolist(), kept, strict=True):
        confidence, confusion = 1 - teacher[place] / teacher.max(), own[place] / own.max()
        assert weight == pytest.approx(((1 + 0.5 * confidence) * (1 + 2.0 * confusion)).item(), rel=1e-5)
    with pytest.raises(ValueError, match="alpha and beta must be at least 0, got -1.0 and 1.0"):
        ADJUSTMENTS["fire"](batch, keep_all(batch), alpha=-1.0)


def test_the_schedule_switches_once():
    for progress, share in ((0.0, 0.0), (0.29, 0.0), (0.3, 1.0), (0.9, 1.0)):
        batch = make_batch(LENGTHS, progress=progress)
        selection = ADJUSTMENTS["forward_then_reverse"](batch, keep(batch, [1, 4]), switch_at=0.3)
        assert selection.inputs["reverse_share_N"].tolist() == [share, share]


def test_temperature_compares_kept_tokens_with_each_other():
    batch = make_batch(LENGTHS)
    selection = ADJUSTMENTS["temperature"](batch, keep(batch, [0, 3, 5, 8]), base=2.0, strength=0.3)
    difficulty = batch.tokens.extra["hellinger_T"][torch.tensor([0, 3, 5, 8])]
    expected = inverse_difficulty_temperature(difficulty, base=2.0, strength=0.3)
    torch.testing.assert_close(selection.temperature_N, expected)
    hardest, easiest = difficulty.argmax(), difficulty.argmin()
    assert selection.temperature_N[hardest] < selection.temperature_N[easiest]


def test_advantages_compare_answers_of_one_prompt():
    batch = make_batch(LENGTHS, **GROUPS)
    selection = ADJUSTMENTS["advantage"](batch, keep_all(batch))
    torch.testing.assert_close(selection.inputs["advantage_N"], per_token([1.0, -1.0, 0.0, 0.0]))
    smaller = ADJUSTMENTS["advantage"](batch, keep_all(batch), unbiased=True).inputs["advantage_N"]
    torch.testing.assert_close(smaller, per_token([0.5**0.5, -(0.5**0.5), 0.0, 0.0]))
    assert torch.equal(selection.inputs["wrong_N"], per_token([0, 1, 1, 1]).bool())


TWICE = {"prompt_R": torch.tensor([7, 7, 7, 7]), "sample_R": torch.tensor([0, 0, 1, 1])}


@pytest.mark.parametrize("pairs", [{}, TWICE], ids=["two prompts", "one prompt twice in the batch"])
def test_preference_has_the_gradient_of_the_loss_over_pairs(pairs):
    """The surrogate's gradient in every log-probability equals autograd's through -log sigmoid."""
    batch = make_batch(LENGTHS, **{**GROUPS, **pairs})
    selection = ADJUSTMENTS["preference"](batch, keep_all(batch), beta=0.7)
    student = batch.tokens.student_logprob_T.double().requires_grad_()
    ratio = (student - batch.tokens.teacher_logprob_T.double()).split(LENGTHS)
    margins = [0.7 * (ratio[good].mean() - ratio[own].mean()) for good, own in ((0, 1), (2, 3))]
    loss = -torch.stack(margins).sigmoid().log().mean()
    (expected,) = torch.autograd.grad(loss, student)
    surrogate = -(selection.inputs["advantage_N"].double() * student).mean()  # what the learner does with weights of 1
    (found,) = torch.autograd.grad(surrogate, student)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_half_a_pair_teaches_nothing_and_the_other_pairs_what_they_would_alone():
    """Its other half had no scores and was dropped."""
    whole = make_batch(LENGTHS, **GROUPS)
    batch = replace(whole, prompt_R=torch.tensor([1, 2, 3, 3]))
    found = ADJUSTMENTS["preference"](batch, keep_all(batch)).inputs["advantage_N"]
    both = ADJUSTMENTS["preference"](whole, keep_all(whole)).inputs["advantage_N"]
    alone = sum(LENGTHS[:2])
    assert torch.equal(found[:alone], torch.zeros(alone))
    torch.testing.assert_close(found[alone:], 2 * both[alone:])  # a mean over one pair, not over two


def test_a_prompt_that_is_in_the_batch_twice_is_one_group_of_all_its_answers():
    """Its pass rate, and what an answer's reward is measured against, are known the better."""
    batch = make_batch(LENGTHS, **{**GROUPS, **TWICE})  # rewards 1, 0, 0, 0
    rollout_N = batch.rollout_T
    advantage = ADJUSTMENTS["advantage"](batch, keep_all(batch)).inputs["advantage_N"]
    expected = torch.tensor([3.0, -1.0, -1.0, -1.0]) / 3.0**0.5
    torch.testing.assert_close(advantage, expected[rollout_N])
    paced = ADJUSTMENTS["paced"](batch, keep_all(batch)).weight_N
    torch.testing.assert_close(paced, torch.full_like(paced, 4 * 0.25 * 0.75))


def test_what_an_adjustment_lacks_is_said():
    batch = make_batch(LENGTHS)
    for name in ("reward", "paced", "advantage"):
        with pytest.raises(ConfigError, match=f"adjust.{name} needs rewards: set data.grader"):
            ADJUSTMENTS[name](batch, keep_all(batch))
    lonely = replace(make_batch(LENGTHS, **GROUPS), prompt_R=torch.tensor([1, 2, 3, 4]))
    with pytest.raises(ConfigError, match="adjust.preference needs one answer of the teacher and one of the student"):
        ADJUSTMENTS["preference"](lonely, keep_all(lonely))
    kdrl = TipRunConfig(loss=LossConfig(divergence="kdrl"))
    with pytest.raises(HookError, match="^the loss needs advantage_N, which no entry of `adjust` gives"):
        build_hooks(kdrl).select(batch)


def test_a_selection_without_weight_stops_the_run(monkeypatch):
    def nothing(batch, selection):
        return replace(selection, weight_N=torch.zeros_like(selection.weight_N))

    monkeypatch.setitem(ADJUSTMENTS, "nothing", nothing)
    with pytest.raises(StageError, match="select: no token has a weight above 0"):
        build_hooks(TipRunConfig(adjust={"nothing": {}})).select(make_batch(LENGTHS))


def test_iw_falls_with_the_gap_that_lies_before():
    batch = make_batch((3, 2))
    a = (batch.tokens.teacher_logprob_T - batch.tokens.student_logprob_T).abs().double()
    first, second = a[:3].sum(), a[3:].sum()
    share = torch.stack([a[0] * 0, a[0] / first, (a[0] + a[1]) / first, a[0] * 0, a[3] / second])
    selection = ADJUSTMENTS["iw"](batch, keep(batch, [0, 2, 4]), gamma=0.8)
    torch.testing.assert_close(selection.weight_N, (1 + 0.8 * (1 - share))[[0, 2, 4]].float())


def test_iw_of_equal_models_is_even():
    batch = make_batch((3, 2))
    tokens = replace(batch.tokens, teacher_logprob_T=batch.tokens.student_logprob_T)
    selection = ADJUSTMENTS["iw"](replace(batch, tokens=tokens), keep_all(batch))
    assert selection.weight_N.tolist() == [1.5] * 5


def test_sure_weighs_the_unlikely_tokens():
    batch = make_batch((3, 2))
    p = batch.tokens.student_logprob_T.exp()
    selection = ADJUSTMENTS["sure"](batch, keep(batch, [1, 4]), alpha=3.0)
    torch.testing.assert_close(selection.weight_N, 1 + 3 * (1 - p[[1, 4]]))


def test_select_kd_all_but_drops_what_the_teacher_would_not_say():
    batch = make_batch((3, 2))
    tokens = replace(batch.tokens, extra={"teacher_rank_T": torch.tensor([0.0, 4.0, 5.0, 1.0, 9.0])})
    selection = ADJUSTMENTS["select_kd"](replace(batch, tokens=tokens), keep_all(batch))
    torch.testing.assert_close(selection.weight_N, torch.tensor([1.0, 1.0, 0.01, 1.0, 0.01]))
    selection = ADJUSTMENTS["select_kd"](replace(batch, tokens=tokens), keep_all(batch), top=1, low=0.0)
    assert selection.weight_N.tolist() == [1, 0, 0, 0, 0]


def test_opsa_pushes_the_kept_tokens_down_by_their_entropy():
    batch = make_batch((3, 2))
    entropy = torch.tensor([0.9, 0.2, 0.1, 0.4, 0.6])
    batch = replace(batch, tokens=replace(batch.tokens, entropy_T=entropy))
    selection = ADJUSTMENTS["opsa"](batch, keep(batch, [1, 3, 4]))
    torch.testing.assert_close(selection.inputs["advantage_N"], torch.tensor([-0.5, -0.75, -1.0]))


@pytest.fixture
def schema():
    ConfigStore.instance().store(name="schema", node=TipRunConfig)


@pytest.mark.usefixtures("schema")
def test_the_control_without_a_teacher_keeps_the_unlikely_fifth():
    hooks = build_hooks(compose_tip("method=opsa"))
    batch = make_batch((10, 5))
    selection = hooks.select(batch)
    lowest = [batch.tokens.student_logprob_T[:10].argsort()[:2], 10 + batch.tokens.student_logprob_T[10:].argsort()[:1]]
    assert selection.index_N.tolist() == sorted(torch.cat(lowest).tolist())
    student, teacher = (torch.randn(2, 3, 4).log_softmax(-1) for _ in range(2))
    value = hooks.divergence(student[0], teacher[0], **selection.inputs)
    assert torch.equal(value, hooks.divergence(student[0], teacher[1], **selection.inputs))
    torch.testing.assert_close(value, -selection.inputs["advantage_N"] * student[0][:, 0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("iw", {"gamma": -1.0}, "gamma must be at least 0, got -1.0"),
        ("sure", {"alpha": -0.5}, "alpha must be at least 0, got -0.5"),
        ("select_kd", {"top": 0}, r"need top >= 1 and low in \[0, 1\], got 0 and 0.01"),
    ],
)
def test_weights_out_of_range_are_refused(name, options, message):
    batch = make_batch((3, 2))
    with pytest.raises(ValueError, match=message):
        ADJUSTMENTS[name](batch, keep_all(batch), **options)
