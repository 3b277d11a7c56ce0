"""Settings that no run could mean are refused by name, where the settings become a config."""

import math
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from opsd.config.checks import function_named
from opsd.config.engine import TeacherConfig
from opsd.config.http import HttpConfig, check_url
from opsd.config.loss import LossConfig
from opsd.config.run import LearnerConfig, RunConfig, compose_config
from opsd.errors import ConfigError
from opsd.evaluation.config import EvaluateConfig
from opsd.teacher.server.config import ServerConfig

REQUIRED = {"output_dir": "out", "student": {"path": "s"}, "data": {"train_path": "a"}}
MODULE = """
def build(config):
    return None
def without():
    return None
def build_2(config, *, option):
    return None
value = 3
"""


def composed(settings, config_class=RunConfig, required=REQUIRED):
    return compose_config(OmegaConf.merge(OmegaConf.create(required), OmegaConf.create(settings)), config_class)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"learner": {"learning_rate": math.inf}}, "learner.learning_rate must be a finite number, got inf"),
        ({"learner": {"weight_decay": math.nan}}, "learner.weight_decay must be at least 0, got nan"),
        ({"learner": {"weight_decay": -5}}, "learner.weight_decay must be at least 0, got -5"),
        ({"learner": {"weight_decay": math.inf}}, "learner.weight_decay must be a finite number, got inf"),
        ({"learner": {"adam_betas": [0.9, 1.0]}}, "learner.adam_betas must be two numbers in [0, 1), got [0.9, 1.0]"),
        ({"learner": {"adam_betas": [0.9, math.nan]}}, "learner.adam_betas must be two numbers in [0, 1), got"),
        ({"learner": {"adam_betas": [-0.1, 0.9]}}, "learner.adam_betas must be two numbers in [0, 1), got [-0.1, 0.9]"),
        ({"rollout": {"temperature": math.inf}}, "rollout.temperature must be a finite number, got inf"),
        ({"rollout": {"top_p": 0}}, "rollout.top_p must be in (0, 1], got 0"),
        ({"rollout": {"gpu_memory_utilization": 0}}, "rollout.gpu_memory_utilization must be in (0, 1], got 0"),
        ({"teacher": {"kv_cache_gib": math.inf}}, "teacher.kv_cache_gib must be a finite number, got inf"),
        ({"teacher": {"follow_decay": math.nan}}, "teacher.follow_decay must be in [0.0, 1.0], got nan"),
        ({"loss": {"options": {"beta": math.nan}}}, "loss.options.beta must be a finite number, got nan"),
        ({"loss": {"terms": {"pearson": {"weight": math.inf}}}}, "loss.terms.pearson.weight must be a finite number"),
        ({"loss": {"terms": {"pearson": {"weight": True}}}}, "loss.terms.pearson must look like {weight: 0.1}"),
        ({"teacher": {"by_source": {"a": {"kv_cache_gib": math.inf}}}}, "teacher.by_source.a.kv_cache_gib must be a"),
        ({"placement": {"wait_s": 1e300}}, "placement.wait_s must be greater than 0 and at most 1e+09 seconds"),
        ({"num_steps": 2**63}, "num_steps must fit in 64 bits, got a number of 64 bits"),
        ({"hook_options": {"power": 10**400}}, "hook_options.power must fit in 64 bits, got a number of 1329 bits"),
        ({"output_dir": "out\0"}, "output_dir must be text without NUL"),
        ({"data": {"instruction": "\ud800"}}, "data.instruction must be text without NUL and without halves"),
        ({"stop_at_step": 301}, "stop_at_step=301 is beyond the run's last step, 300"),
    ],
)
def test_a_value_that_no_run_could_mean_is_refused_by_name(settings, said):
    with pytest.raises(ConfigError) as refused:
        composed(settings)
    assert said in str(refused.value)


@pytest.mark.parametrize("betas", [[0.9], [0.9, 0.99, 0.999], []])
def test_adams_betas_are_two(betas):
    with pytest.raises(ConfigError, match="adam_betas"):
        composed({"learner": {"adam_betas": betas}})
    with pytest.raises(ConfigError, match=r"learner.adam_betas must be two numbers in \[0, 1\), got "):
        LearnerConfig(adam_betas=tuple(betas))


def test_the_bounds_themselves_are_values():
    cfg = composed(
        {
            "learner": {"adam_betas": [0, 0.999999], "weight_decay": 0}, "rollout": {"top_p": 1}, "stop_at_step": 300,
            "placement": {"wait_s": 1e9}, "seed": 2**63 - 1, "hook_options": {"deep": [{"x": [1e308, -1, "", None]}]},
        }
    )  # fmt: skip
    assert (cfg.seed, cfg.stop_at_step, list(cfg.learner.adam_betas)) == (2**63 - 1, 300, [0, 0.999999])


def test_steps_to_stop_at_are_counted_against_the_epochs_steps():
    """How many steps they are is known when the prompts are counted."""
    cfg = RunConfig(output_dir="out", num_epochs=2, stop_at_step=400)
    with pytest.raises(ConfigError, match="stop_at_step=400 is beyond the run's last step, 12"):
        replace(cfg, num_epochs=0, num_steps=12)


def test_the_other_programs_settings_are_looked_at_too():
    needed = {"output_dir": "out", "models": {"a": "m"}, "data": {"paths": ["p"]}}
    for settings, said in (
        ({"temperature": math.inf}, "temperature must be a finite number, got inf"),
        ({"temperature": math.nan}, "temperature must be a finite number, got nan"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"engine": {"kv_cache_gib": math.inf}}, "engine.kv_cache_gib must be a finite number, got inf"),
    ):
        with pytest.raises(ConfigError, match=f"^{said}"):
            composed(settings, EvaluateConfig, needed)
    with pytest.raises(ConfigError, match="^teacher.kv_cache_gib must be a finite number, got inf"):
        ServerConfig(teacher=TeacherConfig(kv_cache_gib=math.inf))


def test_a_number_that_is_not_one_is_refused_in_a_section_of_its_own():
    for make in (lambda: HttpConfig(timeout_s=math.nan), lambda: LossConfig(terms={"pearson": 1})):
        with pytest.raises(ConfigError):
            make()


@pytest.mark.parametrize(
    "url",
    [
        "http://host:text", "http://host:70000", "http://host:-1", "http://host:0", "http://[::1", "http://::1]", "http://",
        "http:///path", "host:8100", "ftp://host", "http://host :8100", "http://ho\nst:8100", "http://host:8100\t", "",
        "http://host:8100?x=1", "http://host#x", "http://h\u00f6st", "http://[not:an:address]:8100",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="^teacher.urls must hold addresses such as http://host:8100, got "):
        check_url("teacher.urls", url)


@pytest.mark.parametrize("url", ["http://me:secret@host:8100", "http://me:secret@host:text", "me:secret@host"])
def test_a_password_in_an_address_is_not_shown(url):
    with pytest.raises(ConfigError, match=r"^teacher.urls must hold no user or password \(host") as refused:
        check_url("teacher.urls", url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["http://host", "https://host:8100/", "http://10.0.0.1:1", "http://[::1]:8100", "http://a-b_c.d:65535/teacher"],
)
def test_an_address_is_taken(url):
    check_url("teacher.urls", url)


def test_a_function_of_the_users_is_one_that_takes_what_it_is_given(tmp_path, monkeypatch):
    (tmp_path / "bad_inputs_module.py").write_text(MODULE)
    (tmp_path / "bad_inputs_broken.py").write_text("def build(config:\n")
    (tmp_path / "bad_inputs_lacking.py").write_text("from opsd.errors import NoSuchError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert function_named("hooks", "bad_inputs_module:build", takes="config")("config") is None
    for path, said in (
        ("bad_inputs_module:value", r"hooks=bad_inputs_module:value must be a function of \(config\), got int$"),
        ("bad_inputs_module:without", r"must be a function of \(config\): too many positional arguments$"),
        ("bad_inputs_module:build_2", r"must be a function of \(config\): missing a required .*'option'"),
        ("bad_inputs_module:nothing", "bad_inputs_module has no nothing$"),
        ("bad_inputs_broken:build", r"cannot import bad_inputs_broken: .*\(bad_inputs_broken.py, line 1\)$"),
        ("bad_inputs_lacking:build", "cannot import bad_inputs_lacking: cannot import name 'NoSuchError'"),
        ("no_such_module:build", "cannot import no_such_module: No module named 'no_such_module'$"),
        ("bad_inputs_module", "must look like package.module:function, got 'bad_inputs_module'$"),
        (".relative:build", "must look like package.module:function, got '.relative:build'$"),
    ):
        with pytest.raises(ConfigError, match=said):
            function_named("hooks", path, takes="config")
