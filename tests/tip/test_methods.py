"""The files of conf/method: each composes from its name alone into hooks that can select, and the README lists it."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from opsd.ops.objective import Objective
from tests.tip.batches import make_batch
from tests.tip.test_conf import compose_tip
from tip.config import SelectorConfig, TipRunConfig
from tip.plugin import build_hooks

METHODS = sorted(path.name.removesuffix(".yaml") for path in (files("tip.conf") / "method").iterdir())
LENGTHS = (30, 20, 44, 10)
FACTS = {
    "prompt_R": torch.tensor([7, 7, 2, 2]),
    "sample_R": torch.tensor([0, 0, 0, 0]),
    "reward_R": torch.tensor([1.0, 0.0, 0.0, 1.0]),
    "on_policy_R": torch.tensor([False, True, False, True]),
}
README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(autouse=True)
def schema():
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=TipRunConfig)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_line(name):
    """What it selects gives the objective all that it needs."""
    cfg = compose_tip(f"method={name}")
    hooks = build_hooks(cfg)
    selection = hooks.select(make_batch(LENGTHS, **FACTS))
    assert len(selection) > 0 and selection.weight_N.min() > 0
    objective = Objective.of(hooks.divergence)
    logprobs = torch.randn(2, len(selection), 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    support = torch.arange(5).expand(len(selection), 5)
    inputs = objective.wanted({"support_NU": support, **selection.inputs})
    assert objective(*logprobs, **inputs).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_settings_after_a_method_win(name):
    cfg = compose_tip(f"method={name}", "selector.ratio=0.3", "loss.support=union", "learner.learning_rate=3e-4")
    assert (cfg.selector.ratio, cfg.loss.support, cfg.learner.learning_rate) == (0.3, "union", 3e-4)


def test_the_default_method_is_tip_as_it_stands():
    assert compose_tip() == compose_tip("method=tip") and compose_tip().selector == SelectorConfig()
    assert compose_tip("method=opd").selector.name == "all"


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_lists_the_method(name):
    rows = [line.split("|")[1] for line in README.read_text().splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in row for row in rows)
