"""The hooks of a TIP run: what they select, that they repeat themselves, and what a user can add or get wrong."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

import opsd.hooks
from opsd.config.loss import LossConfig
from opsd.config.run import RunConfig
from opsd.errors import ConfigError
from opsd.hook_checks import HookError, check_hooks
from opsd.hooks import load_build_hooks
from opsd.ops.losses.divergences import DIVERGENCES
from opsd.types import BatchStats, Selection, StepReport, TokenStats
from tip.adjustments import ADJUSTMENTS
from tip.config import SelectorConfig, TipRunConfig
from tip.filters import FILTERS
from tip.plugin import build_hooks
from tip.scores import SCORES, ScoreOptions
from tip.selectors import SELECTORS

LENGTHS = (3, 20, 9)

OWN_HOOKS = """
from opsd.ops.losses.divergences import DIVERGENCES
from tip.plugin import build_hooks
from tip.scores import SCORES
from tip.selectors import SELECTORS


def later_first(stats, options):
    return stats.entropy_T.new_tensor(range(len(stats)))


def total_variation(student_logprobs_NB, teacher_logprobs_NB, *, power=1.0):
    return ((student_logprobs_NB.exp() - teacher_logprobs_NB.exp()).abs().sum(1) / 2) ** power


def above_half(score_T, lengths, *, ratio=1.0, scope="rollout", generator=None):
    return SELECTORS["top_ratio"](score_T, lengths, ratio=ratio / 2, scope=scope)


SCORES["later_first"] = later_first
SELECTORS["above_half"] = above_half
DIVERGENCES["total_variation"] = total_variation
"""


@pytest.fixture
def own_hooks(tmp_path, monkeypatch):
    """A user's own package; what it added to the two dicts is taken out again."""
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "hooks.py").write_text(OWN_HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_pkg.hooks:build_hooks"
    SCORES.pop("later_first", None)
    SELECTORS.pop("above_half", None)
    DIVERGENCES.pop("total_variation", None)
    for name in ("my_pkg.hooks", "my_pkg"):
        sys.modules.pop(name, None)


def make_batch(step=0):
    generator = torch.Generator().manual_seed(0)
    entropy, reverse, forward = torch.rand(3, sum(LENGTHS), generator=generator)
    tokens = TokenStats(entropy_T=entropy, reverse_kl_T=reverse, forward_kl_T=forward)
    return BatchStats(step=step, lengths=LENGTHS, tokens=tokens)


def select(batch, seed=0, **selector):
    return build_hooks(TipRunConfig(seed=seed, selector=SelectorConfig(**selector))).select(batch)


def same(a, b):
    return torch.equal(a.index_N, b.index_N) and torch.equal(a.weight_N, b.weight_N)


@pytest.mark.parametrize("selector", [{"name": "all"}, {"ratio": 1.0}, {"ratio": 1.0, "scope": "batch"}])
def test_keeping_everything_is_plain_distillation_bit_for_bit(selector):
    batch = make_batch()
    plain, tip = opsd.hooks.select_all(batch), select(batch, **selector)
    assert same(plain, tip)
    assert plain.index_N.dtype == tip.index_N.dtype and plain.weight_N.dtype == tip.weight_N.dtype


def test_the_configured_score_and_selector_are_used():
    batch = make_batch()
    options = {"scaling": "quantile", "clip_quantile": 0.8}
    for score in ("soft_or", "entropy", "divergence", "q3", "bottom"):
        score_T = SCORES[score](batch.tokens, ScoreOptions(**options))
        expected = SELECTORS["top_ratio"](score_T, LENGTHS, ratio=0.2, scope="batch")
        assert same(select(batch, score=score, ratio=0.2, scope="batch", **options), expected)
    soft = SELECTORS["soft"](SCORES["soft_or"](batch.tokens), LENGTHS)
    assert same(select(batch, name="soft"), soft)


def test_the_loss_is_that_of_plain_distillation():
    cfg = TipRunConfig()
    [(weight, plain)], [(tip_weight, tip)] = (
        build(cfg).divergence.parts for build in (opsd.hooks.build_hooks, build_hooks)
    )
    assert (tip.function.func, tip.function.keywords) == (plain.function.func, plain.function.keywords)
    assert tip_weight == weight


def test_a_ratio_that_follows_the_loss_survives_a_resume():
    cfg = TipRunConfig(
        num_steps=40,
        selector=SelectorConfig(ratio=1.0, schedule="loss_driven", schedule_options={"beta": 0.5}, scope="batch"),
    )
    losses = [2.0 * 0.9**step for step in range(20)]

    def train(hooks, first, last):
        for step in range(first, last):
            yield len(hooks.select(make_batch(step)))
            hooks.after_step(
                StepReport(loss=losses[step], grad_norm=1, learning_rate=1, num_kept=1, num_trunk_tokens=1)
            )

    whole = list(train(build_hooks(cfg), 0, 20))
    first, second = build_hooks(cfg), build_hooks(cfg)
    before = list(train(first, 0, 9))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + list(train(second, 9, 20)) == whole
    assert whole[:3] == [32, 32, 32] and whole[-1] < 20


@pytest.mark.parametrize("selector", [{"name": "sampled"}, {"score": "random"}, {"name": "sampled", "score": "random"}])
def test_draws_depend_on_seed_and_step_alone(selector):
    first = select(make_batch(step=7), seed=3, **selector)
    torch.manual_seed(99)  # neither the global generator nor earlier steps matter, as after a resume
    hooks = build_hooks(TipRunConfig(seed=3, selector=SelectorConfig(**selector)))
    earlier = hooks.select(make_batch(step=6))
    assert same(hooks.select(make_batch(step=7)), first) and not same(earlier, first)
    assert not same(select(make_batch(step=7), seed=4, **selector), first)
    assert not same(select(make_batch(step=3), seed=7, **selector), first)


def test_hooks_can_be_pickled():
    hooks = pickle.loads(pickle.dumps(build_hooks(TipRunConfig())))
    assert same(hooks.select(make_batch()), select(make_batch()))


def test_own_score_and_selector_from_another_module(own_hooks):
    cfg = TipRunConfig(hooks=own_hooks, selector=SelectorConfig(score="later_first", name="above_half", ratio=0.4))
    selection = load_build_hooks(cfg.hooks)(cfg).select(make_batch())
    assert selection.index_N.tolist() == [2, 19, 20, 21, 22, 31]


def test_own_divergence_from_another_module(own_hooks):
    loss = LossConfig(divergence="total_variation", options={"power": 2})
    build = load_build_hooks(own_hooks)  # what a run does first: it adds to the dicts
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert build(TipRunConfig(loss=loss)).divergence(student, teacher).item() == pytest.approx(0.16)


def test_own_score_of_another_signature_is_refused_before_the_run(monkeypatch):
    monkeypatch.setitem(SCORES, "mine", lambda stats: stats.entropy_T)
    with pytest.raises(ConfigError, match=r"selector.score=mine: .* must take \(stats, options\), as every score does"):
        build_hooks(TipRunConfig(selector=SelectorConfig(score="mine")))


def by_entropy(stats, options):
    return stats.entropy_T


def test_what_own_functions_return_is_looked_at_and_the_function_named(monkeypatch):
    monkeypatch.setitem(SCORES, "mean", lambda stats, options: stats.entropy_T.mean())
    monkeypatch.setitem(SCORES, "short", lambda stats, options: stats.entropy_T[1:])
    monkeypatch.setitem(SCORES, "array", lambda stats, options: stats.entropy_T.numpy())
    monkeypatch.setitem(SCORES, "nan", lambda stats, options: stats.entropy_T / 0 * 0)
    for score, got in (("mean", r"got shape \(\)"), ("short", r"got shape \(31,\)"), ("array", "got ndarray")):
        with pytest.raises(HookError, match=rf"selector.score={score} must return .* shape \(32,\), .*{got}"):
            select(make_batch(), score=score)
    with pytest.raises(HookError, match=r"^selector.name=top_ratio \(score nan\): scores must be finite"):
        select(make_batch(), score="nan")


def keeping(index, weight=None):
    index_N = torch.tensor(index)
    return lambda score_T, lengths, **options: Selection(
        index_N=index_N, weight_N=torch.ones(len(index)) if weight is None else torch.tensor(weight)
    )


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (keeping([3, 1]), "index_N must be ascending and distinct, got 3 before 1"),
        (keeping([1, 1]), "index_N must be ascending and distinct, got 1 before 1"),
        (keeping([-1, 1]), "index_N must be places from 0 on, got -1"),
        (keeping([1, 32]), r"must keep tokens by their places 0\.\.31, got place 32"),
        (keeping([1, 2], [1.0]), r"weight_N must have shape \(2,\), got \(1,\)"),
        (keeping([1, 2], [1.0, -0.5]), "weight_N must be finite and at least 0, got -0.5 at place 1 of 2"),
        (keeping([1, 2], [float("nan"), 1.0]), "weight_N must be finite and at least 0, got nan at place 0 of 2"),
        (lambda score_T, lengths, **options: score_T > 0, "must return a Selection, got Tensor"),
    ],
)
def test_a_selection_that_is_none_is_refused_with_the_selectors_name(monkeypatch, selector, message):
    monkeypatch.setitem(SELECTORS, "mine", selector)
    with pytest.raises(HookError, match=rf"^selector.name=mine \(score soft_or\).* {message}"):
        select(make_batch(), name="mine")


def test_filters_and_adjustments_are_looked_at_too(monkeypatch):
    monkeypatch.setitem(FILTERS, "numbers", lambda batch: batch.tokens.entropy_T)
    monkeypatch.setitem(FILTERS, "rollouts", lambda batch: torch.ones(3, dtype=torch.bool))
    monkeypatch.setitem(ADJUSTMENTS, "nothing", lambda batch, selection: None)
    for cfg, message in (
        (TipRunConfig(filters={"numbers": {}}), "filters.numbers must return torch.bool, got torch.float32"),
        (TipRunConfig(filters={"rollouts": {}}), r"filters.rollouts must return .*\(32,\), .* got shape \(3,\)"),
        (TipRunConfig(adjust={"nothing": {}}), "adjust.nothing must return a Selection, got NoneType"),
    ):
        with pytest.raises(HookError, match=message):
            build_hooks(cfg).select(make_batch())


def test_options_out_of_range_are_refused_in_words():
    schedule = SelectorConfig(schedule="loss_driven", schedule_options={"floor": 2.0})
    with pytest.raises(ConfigError, match="selector.schedule_options: need 0 < floor <= initial <= 1, got floor 2.0"):
        build_hooks(TipRunConfig(selector=schedule))
    filtered = build_hooks(TipRunConfig(filters={"horizon": {"start": 9, "end": 4}}))
    with pytest.raises(HookError, match="^filters.horizon: need 1 <= start <= end, got 9 and 4"):
        filtered.select(make_batch())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"filters": {"horizon": {"start": "a", "end": 4}}}, "filters.horizon.start must be a whole number, got 'a'"),
        ({"filters": {"horizon": {"start": 1.5, "end": 4}}}, "filters.horizon.start must be a whole number, got 1.5"),
        ({"filters": {"fire": {"drop": [0.2]}}}, r"filters.fire.drop must be a number, got \[0.2\]"),
        ({"filters": {"fire": {"drop": 1}}}, r"filters.fire: drop must be in \[0, 1\), got 1"),
        ({"adjust": {"advantage": {"unbiased": 1}}}, "adjust.advantage.unbiased must be true or false, got 1"),
        ({"adjust": {"forward_then_reverse": {"switch_at": 2}}}, r"switch_at must be in \[0, 1\], got 2"),
        ({"adjust": {"temperature": {"strength": -1}}}, "adjust.temperature: strength must be at least 0, got -1"),
        ({"adjust": {"temperature": {"strength": 1e9}}}, "adjust.temperature: temperature_N must be finite and above"),
        ({"adjust": {"fire": {"alpha": 1e300}}}, "adjust.fire: weight_N must be finite and at least 0, got inf"),
        ({"adjust": {"fire": {"alpha": None}}}, "adjust.fire.alpha must be a number, got None"),
        (
            {"answers": "mixed", "stats": "learner", "answer_options": {"student_share": 2}},
            r"answer_options.student_share must be in \[0, 1\], got 2",
        ),
        (
            {"answers": "mixed", "stats": "learner", "answer_options": {"seed": 2}},
            "answer_options: 'mixed' takes student_share, got seed",
        ),
        (
            {"selector": SelectorConfig(schedule="loss_driven", schedule_options={"initial": 0.1})},
            "selector.schedule_options: 'loss_driven' takes num_warmup, beta, loss_tolerance, ratio_step, floor, got i",
        ),
    ],
)
def test_options_of_the_wrong_kind_or_range_are_refused_before_the_run(settings, said):
    cfg = TipRunConfig(**settings)
    with pytest.raises(ConfigError, match=said):
        check_hooks(build_hooks(cfg), cfg)


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(divergence="kdrl"),
        LossConfig(divergence="policy_gradient"),
        LossConfig(terms={"policy_gradient": {"weight": 1.0}}),
    ],
)
def test_a_ratio_does_not_follow_a_loss_without_a_value(loss):
    selector = SelectorConfig(ratio=1.0, schedule="loss_driven")
    with pytest.raises(
        ConfigError, match="only the gradient of .*(kdrl|policy_gradient).* has a meaning, not its value"
    ):
        build_hooks(TipRunConfig(loss=loss, selector=selector))
    build_hooks(TipRunConfig(loss=loss))
    build_hooks(TipRunConfig(selector=selector))


def test_unknown_names_are_refused_with_the_known_ones():
    known = ", ".join(sorted(SCORES))
    with pytest.raises(ConfigError, match=f"selector.score must be one of {known}, got 'entrpy'"):
        build_hooks(TipRunConfig(selector=SelectorConfig(score="entrpy")))
    with pytest.raises(
        ConfigError, match="selector.name must be one of all, prefix, sampled, soft, top_ratio, got 'top'"
    ):
        build_hooks(TipRunConfig(selector=SelectorConfig(name="top")))


def test_a_config_without_selector_is_refused():
    with pytest.raises(ConfigError, match="needs the `selector` settings: start with python -m tip.train"):
        build_hooks(RunConfig(hooks="tip.plugin:build_hooks"))


def test_opsd_runs_without_tip():
    code = "import sys, opsd.config.run, opsd.hooks; print([m for m in sys.modules if m.split('.')[0] == 'tip'])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
