"""NaN and infinity in a student's weights, losses and gradients: named, and nothing moves."""

import copy
from dataclasses import replace

import pytest
import torch

from opsd.config.run import LearnerConfig
from opsd.errors import DataError, StageError
from opsd.learner.attention import PACKED
from opsd.learner.finite import first_not_finite, require_finite_weights
from opsd.learner.loading import load_student
from opsd.learner.model import DistillationModel, shard, trained_tensors
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.learner.packing import pack
from opsd.learner.step import train_step
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Selection, Vocabulary
from tests.opsd.builders import batch_of, scored_rollouts
from tests.opsd.process_group import one_rank
from tests.tiny_models import make_tiny_qwen3

VOCABULARY = Vocabulary(size=60, stop_ids=(0, 5))
CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with one_rank():
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(make_tiny_qwen3(tmp_path_factory.mktemp("s"), tied=True, seed=3, eos_token_id=0, scale=2.0))


class Learner:
    """A rank of one, with its optimiser after one step."""

    def __init__(self, path, **settings):
        cfg = LearnerConfig(**{"learning_rate": 1e-3, "warmup_steps": 4, **settings})
        causal_lm = load_student(path, attention=PACKED, trust_remote_code=False)
        self.model = DistillationModel(causal_lm, reverse_kl, VOCABULARY)
        shard(self.model, device="cpu", num_ranks=1, dtype="float32")
        self.optimizer = build_optimizer(self.model.parameters(), cfg)
        self.scheduler = build_scheduler(self.optimizer, cfg, 10)

    def step(self, batches):
        return train_step(self.model, self.optimizer, self.scheduler, batches, device=CPU, max_grad_norm=1.0)

    def state(self):
        """Everything that a step changes."""
        weights = {name: p.full_tensor().detach().clone() for name, p in self.model.named_parameters()}
        return weights, copy.deepcopy(self.optimizer.state_dict()), copy.deepcopy(self.scheduler.state_dict())


def batches():
    scored = batch_of(scored_rollouts([5, 9], VOCABULARY))
    every = Selection(index_N=torch.arange(14), weight_N=torch.ones(14))
    [found] = pack(scored, every, "teacher", VOCABULARY, num_ranks=1, max_tokens=14)
    assert len(found) == 2
    return found


def with_loss(value):
    """The second micro-batch weighs a token by NaN or infinity."""
    first, second = batches()
    weight_N = second.weight_N.clone()
    weight_N[1] = value
    return [first, replace(second, weight_N=weight_N)]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_with_a_loss_that_is_not_finite_changes_nothing_and_says_so(path, value):
    learner, other = Learner(path), Learner(path)
    for each in (learner, other):
        assert each.step(batches()).skipped == ""
    before = learner.state()
    report = learner.step(with_loss(value))
    assert report.skipped.startswith(f"the loss is {value} and the gradient norm is nan (the first such weight: ")
    assert_same(learner.state(), before)
    assert all(p.grad is None for p in learner.model.parameters())
    assert learner.step(batches()) == other.step(batches())  # as if it had not been
    assert_same(learner.state(), other.state())


def test_a_gradient_that_is_not_finite_is_found_where_the_loss_is_and_its_weight_is_named(path, monkeypatch):
    learner = Learner(path)
    learner.step(batches())
    before = learner.state()
    weight = learner.model.causal_lm.get_submodule("model.layers.1.mlp.up_proj").weight
    norm_of = torch.nn.utils.get_total_norm

    def of_an_overflow(gradients):
        weight.grad.to_local()[2, 5] = float("inf")
        return norm_of(gradients)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", of_an_overflow)
    report = learner.step(batches())
    assert report.skipped == f"the gradient norm is {report.grad_norm} (the first such weight: {UP})"
    assert 0 < report.loss < 100
    assert_same(learner.state(), before)


def test_a_weight_that_is_not_finite_is_named_with_where_it_came_from(path):
    model = Learner(path).model
    require_finite_weights(model, "student.path=/s", CPU)
    weight = model.causal_lm.get_submodule("model.layers.1.mlp.up_proj").weight
    for value in ("nan", "inf", "-inf"):
        with torch.no_grad():
            weight.to_local()[3, 7] = float(value)
        with pytest.raises(DataError, match=f"^student.path=/s: the weight {UP} holds NaN or infinity"):
            require_finite_weights(model, "student.path=/s", CPU)
    with torch.no_grad():
        weight.to_local()[3, 7] = 0.0
    assert first_not_finite(trained_tensors(model), CPU) is None


def test_a_step_that_makes_a_weight_infinite_ends_the_run_before_it_is_saved(path):
    learner = Learner(path, learning_rate=3.0)
    weight = learner.model.causal_lm.get_submodule("model.layers.1.mlp.up_proj").weight

    @torch.no_grad()
    def overflow(*_):
        weight.to_local()[0, 0] = float("inf")

    learner.optimizer.register_step_post_hook(overflow)
    with pytest.raises(StageError, match=rf"learn: .* at a learning rate of 0.6, made the weight {UP} NaN or infinite"):
        learner.step(batches())
