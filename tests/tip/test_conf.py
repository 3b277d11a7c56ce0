"""The YAML files: each composes, says what its name says, and holds nothing that the dataclass already says."""

from dataclasses import fields
from importlib.resources import files

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from opsd.config.run import RunConfig, compose_config
from opsd.errors import ConfigError
from tip.config import SelectorConfig, TipRunConfig
from tip.plugin import build_hooks

REQUIRED = ["output_dir=out", "student.path=s", "teacher.path=t", "data.train_path=a", "data.eval_path=b"]

EXPECTED = {
    "all": SelectorConfig(name="all", ratio=1.0),
    "soft_or": SelectorConfig(),
    "entropy": SelectorConfig(score="entropy"),
    "divergence": SelectorConfig(score="divergence"),
    "q3": SelectorConfig(score="q3"),
    "random": SelectorConfig(score="random"),
    "bottom": SelectorConfig(score="bottom"),
    "hellinger": SelectorConfig(score="hellinger"),
    "grad_norm": SelectorConfig(score="grad_norm"),
    "teachability": SelectorConfig(score="teachability"),
    "dial": SelectorConfig(score="dial"),
    "ier": SelectorConfig(score="ier"),
    "sampled_rkl": SelectorConfig(score="sampled_rkl"),
    "prefix": SelectorConfig(name="prefix"),
    "sampled": SelectorConfig(name="sampled"),
    "soft": SelectorConfig(name="soft", ratio=1.0),
}

YAML_FILES = {path.name.removesuffix(".yaml"): path for path in (files("tip.conf") / "selector").iterdir()}


@pytest.fixture(autouse=True)
def schema():
    """What the launcher registers before Hydra reads tip.yaml."""
    ConfigStore.instance().store(name="schema", node=TipRunConfig)


def compose_tip(*overrides):
    with initialize_config_module("tip.conf", version_base=None):
        return compose_config(compose("tip", overrides=[*REQUIRED, *overrides]), TipRunConfig)


def test_every_selector_file_is_expected():
    assert set(YAML_FILES) == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_selector_file_composes_into_a_run(name):
    cfg = compose_tip(f"selector={name}")
    assert type(cfg) is TipRunConfig and cfg.selector == EXPECTED[name]
    build_hooks(cfg)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_selector_file_states_only_what_differs(name):
    stated = OmegaConf.to_container(OmegaConf.create(YAML_FILES[name].read_text()))
    defaults = {field.name: field.default for field in fields(SelectorConfig)}
    assert {key for key, value in stated.items() if defaults[key] == value} == set()


def test_default_is_the_papers_score_and_the_tip_hooks():
    cfg = compose_tip()
    assert cfg.selector == SelectorConfig() and cfg.hooks == "tip.plugin:build_hooks"


def test_command_line_overrides_the_chosen_file():
    cfg = compose_tip("selector=entropy", "selector.ratio=0.2", "hooks=my_pkg.hooks:build_hooks", "seed=4")
    assert cfg.selector == SelectorConfig(score="entropy", ratio=0.2)
    assert cfg.hooks == "my_pkg.hooks:build_hooks" and cfg.seed == 4


def test_a_score_s_options_are_checked_and_bound():
    cfg = compose_tip("selector=dial", "+selector.score_options={beta: 1.2}")
    assert build_hooks(cfg).select is not None
    for options, message in (("gamma: 1", "'dial' takes beta, got gamma"), ("beta: high", "beta must be a number")):
        with pytest.raises(ConfigError, match=rf"^selector.score_options.*{message}"):
            build_hooks(compose_tip("selector=dial", f"+selector.score_options={{{options}}}"))
    with pytest.raises(ConfigError, match=r"selector.score_options: 'entropy' takes no options, got beta"):
        build_hooks(compose_tip("selector=entropy", "+selector.score_options={beta: 1}"))


def test_a_score_of_the_users_own_composes():
    assert compose_tip("selector.score=mine").selector.score == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selector.ratio=1.5", r"selector.ratio must be in \(0, 1\], got 1.5"),
        ("selector.ratio=0", r"selector.ratio must be in \(0, 1\], got 0"),
        ("selector.ratio=nan", r"selector.ratio must be in \(0, 1\], got nan"),
        ("selector.clip_quantile=98", r"selector.clip_quantile must be in \(0, 1\], got 98"),
        ("selector.scope=token", "selector.scope must be one of rollout, batch, got 'token'"),
        ("selector.score=attention", "needs teacher.attention=true and teacher.backend=transformers"),
        ("teacher.attention=true", "needs teacher.backend=transformers: a vLLM engine never forms attention weights"),
        ("answers=mixed", "answers=mixed needs stats=learner"),
        ("+filters.fire=0.2", "filters.fire must hold options"),
        ("selector.scaling=log", "selector.scaling must be one of minmax, quantile, got 'log'"),
    ],
)
def test_settings_out_of_range_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        compose_tip(override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.temperature=0.7", "loss.residual=true needs rollout.temperature=1, got 0.7"),
        ("rollout.top_p=0.9", "loss.residual=true needs rollout.top_p=1, got 0.9"),
        ("answers=mixed stats=learner", "loss.residual=true needs answers=student, got mixed"),
        ("answers=teacher_pairs stats=learner", "loss.residual=true needs answers=student, got teacher_pairs"),
        ("method=mixkd", "loss.residual=true needs answers=student, got mixtures"),
        ("method=adakd", "loss.residual=true needs tokens at temperature 1, .* leave adjust.temperature out"),
    ],
)
def test_the_residual_is_refused_where_answers_are_no_draws_of_the_students(override, message):
    with pytest.raises(ConfigError, match=message):
        compose_tip("loss.residual=true", *override.split())
    compose_tip(*override.split())
    assert compose_tip("loss.residual=true").loss.residual


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("tools.build=json:loads answers=mixed stats=learner", "tools.build needs answers=student, got mixed"),
        ("loss.importance_cap=2 answers=mixed stats=learner", "loss.importance_cap needs answers=student, got mixed"),
        ("loss.importance_cap=2 method=adakd", "loss.importance_cap needs tokens at temperature 1"),
        ("loss.importance_cap=2 loss.divergence=forward_kl", "loss.divergence=forward_kl needs loss.importance_cap=0"),
        ("loss.importance_cap=2 loss.payload=hidden", "loss.payload=hidden needs loss.importance_cap=0, got 2"),
        ("loss.importance_cap=0.5", "loss.importance_cap must be at least 1, got 0.5"),
        ("schedule.max_staleness=1 loss.residual=true", "loss.residual=true needs schedule.max_staleness=0, got 1"),
        ("schedule.max_staleness=1 teacher.follow_decay=0.9", "teacher.follow_decay needs schedule.max_staleness=0"),
        ("schedule.max_staleness=2 placement.mode=colocated", "placement.mode=colocated needs schedule.max_staleness"),
        ("schedule.max_staleness=-1", "schedule.max_staleness must be at least 0, got -1"),
        ("schedule.partial_rollouts=true", "schedule.partial_rollouts=true needs schedule.max_staleness of at least 1"),
        (
            "schedule.partial_rollouts=true schedule.max_staleness=1 rollout.weight_transfer=nccl",
            "schedule.partial_rollouts=true needs rollout.weight_transfer=object_store or auto, got nccl",
        ),
        (
            "schedule.partial_rollouts=true schedule.max_staleness=1 loss.residual=true",
            "loss.residual=true needs schedule.max_staleness=0, got 1",
        ),
    ],
)
def test_answers_of_older_weights_are_refused_where_they_would_be_wrong(overrides, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        compose_tip(*overrides.split())


def test_plain_distillation_knows_no_selector():
    with pytest.raises(ConfigError, match="selector"):
        compose_config(OmegaConf.create({"selector": {"ratio": 0.5}}), RunConfig)


def test_sinkds_weight_takes_the_sum_over_rows_that_its_authors_take():
    """Their loss is 8e-4 times a sum over rows, and so is the mean over rows of the term."""
    assert compose_tip("method=sinkd").loss.terms == {"sinkhorn": {"weight": 8.0e-4}}
