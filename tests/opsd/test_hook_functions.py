"""What `hooks` names is TrainHooks of functions that take what a run gives them."""

import numpy as np
import pytest

from opsd.config.run import RunConfig
from opsd.errors import ConfigError
from opsd.hook_checks import check_hooks
from opsd.hooks import TrainHooks, build_hooks
from opsd.ops.losses.divergences import reverse_kl


def test_hooks_that_are_none_are_refused():
    for hooks, got in ((None, "NoneType"), ({}, "dict"), (TrainHooks, "type"), (build_hooks, "function")):
        with pytest.raises(ConfigError, match=f"^hooks=my:build must return TrainHooks, got {got}$"):
            check_hooks(hooks, RunConfig(hooks="my:build"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"divergence": None}, "divergence must be a function, got NoneType"),
        ({"divergence": 0.5}, "divergence must be a function, got float"),
        ({"select": None}, r"select must be a function of \(batch\), got NoneType"),
        ({"select": lambda: None}, r"select must be a function of \(batch\): too many positional arguments"),
        ({"after_step": 3}, r"after_step must be a function of \(report\), got int"),
        ({"rollouts": lambda rollout_pool: None}, r"rollouts must be a function of \(rollout_pool, teacher_pool\): "),
        ({"statistics": None}, "statistics must map names to functions, got None"),
        ({"statistics": {"mine_T": 1}}, "statistics must map names to functions, got {'mine_T': 1}"),
        ({"state_dict": {}}, r"state_dict must be a function of \(\), got dict"),
        ({"state_dict": lambda: None}, "state_dict must return a dictionary, got NoneType"),
        ({"state_dict": lambda: {"ratio": np.float32(1)}}, "state_dict must return what JSON can hold: .*float32"),
        ({"load_state_dict": lambda: None}, r"load_state_dict must be a function of \(state\): too many positional"),
    ],
)
def test_a_hook_that_is_no_such_function_is_named(changes, said):
    with pytest.raises(ConfigError, match=f"^hooks=my:build: {said}"):
        check_hooks(TrainHooks(**{"divergence": reverse_kl, **changes}), RunConfig(hooks="my:build"))


def test_rollouts_that_return_nothing_are_named():
    with pytest.raises(ConfigError, match="must return a function of prompts, got NoneType"):
        check_hooks(TrainHooks(divergence=reverse_kl, rollouts=lambda *_: None), RunConfig())


def test_a_state_of_plain_values_is_taken():
    check_hooks(TrainHooks(divergence=reverse_kl, state_dict=lambda: {"ratio": 0.5, "seen": [1]}), RunConfig())
