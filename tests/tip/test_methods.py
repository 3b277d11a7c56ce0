"""The files of conf/method: each composes from its name alone into hooks that can select, and tip's page lists it."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from opsd.hook_checks import check_hooks
from opsd.ops.losses.objective import Objective
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
PAGE = Path(__file__).resolve().parents[2] / "tip" / "README.md"


@pytest.fixture(autouse=True)
def schema():
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=TipRunConfig)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_line(name):
    """What it selects gives the objective all that it needs."""
    cfg = compose_tip(f"method={name}", "data.grader=math")
    hooks = build_hooks(cfg)
    check_hooks(hooks, cfg)
    selection = hooks.select(make_batch(LENGTHS, **FACTS))
    assert len(selection) > 0 and selection.weight_N.min() > 0
    objective = Objective.of(hooks.divergence)
    logprobs = torch.randn(2, len(selection), 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    support = torch.arange(5).expand(len(selection), 5)
    inputs = objective.takes({"support_NU": support, **selection.inputs})
    assert objective(*logprobs, **inputs).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_settings_after_a_method_win(name):
    cfg = compose_tip(f"method={name}", "selector.ratio=0.3", "loss.support=union", "learner.learning_rate=3e-4")
    assert (cfg.selector.ratio, cfg.loss.support, cfg.learner.learning_rate) == (0.3, "union", 3e-4)


def test_the_default_method_is_tip_as_it_stands():
    assert compose_tip() == compose_tip("method=tip") and compose_tip().selector == SelectorConfig()
    assert compose_tip("method=opd").selector.name == "all"


@pytest.mark.parametrize("name", ["latf", "adakd"])
def test_adakd_chooses_among_the_tokens_of_the_whole_batch(name):
    """As its authors' code does: the hardest half may all be of one answer."""
    hooks = build_hooks(compose_tip(f"method={name}", "selector.ratio=0.5"))
    batch = make_batch(LENGTHS)
    hardest = batch.tokens.extra["hellinger_T"].argsort(descending=True, stable=True)[: sum(LENGTHS) // 2]
    assert hooks.select(batch).index_N.tolist() == sorted(hardest.tolist())


def test_dpkd_is_its_preference_alone():
    """Eq. 9: no divergence beside it, so the loss has the gradient of -log sigmoid and no other."""
    hooks = build_hooks(compose_tip("method=dpkd"))
    pair = {"prompt_R": torch.tensor([7, 7]), "sample_R": torch.tensor([0, 0])}
    batch = make_batch((3, 2), **pair, on_policy_R=torch.tensor([False, True]))
    selection = hooks.select(batch)
    own = batch.tokens.student_logprob_T.double().requires_grad_()
    margin = 0.1 * (own - batch.tokens.teacher_logprob_T)
    (expected,) = torch.autograd.grad(-torch.sigmoid(margin[:3].mean() - margin[3:].mean()).log(), own)
    student, teacher = own.detach()[:, None].repeat(1, 2).requires_grad_(), torch.zeros(5, 2)
    value = Objective.of(hooks.divergence)(student, teacher, **selection.inputs)
    (found,) = torch.autograd.grad((value * selection.weight_N).sum() / selection.weight_N.sum(), student)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=1e-5)
    assert found[:, 1].abs().max() == 0


@pytest.mark.parametrize("name", METHODS)
def test_the_page_of_tip_lists_the_method(name):
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in row for row in rows)
