"""FSDP2's settings on one rank: what they may change is memory, never a gradient."""

import json
from dataclasses import replace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from opsd.config.run import LearnerConfig
from opsd.learner.attention import PACKED
from opsd.learner.loading import load_student
from opsd.learner.model import DistillationModel, shard
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.learner.packing import pack
from opsd.learner.step import train_step
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Selection, Vocabulary
from tests.opsd.builders import batch_of, scored_rollouts
from tests.opsd.process_group import one_rank
from tests.tiny_models import make_tiny_qwen3

VOCABULARY = Vocabulary(size=60, stop_ids=(0, 5))
LENGTHS = [5, 9, 7]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with one_rank():
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A student whose config has dropout in its attention, as some published models have."""
    folder = make_tiny_qwen3(tmp_path_factory.mktemp("s"), tied=True, seed=3, eos_token_id=0, scale=2.0)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    return str(folder)


def sharded(path, **settings):
    causal_lm = load_student(path, attention=PACKED, trust_remote_code=False)
    model = DistillationModel(causal_lm, reverse_kl, VOCABULARY)
    shard(model, device="cpu", num_ranks=1, **{"dtype": "float32", **settings})
    return model


def micro_batches():
    num_tokens = sum(LENGTHS)
    every = Selection(index_N=torch.arange(num_tokens), weight_N=torch.ones(num_tokens))
    scored = batch_of(scored_rollouts(LENGTHS, VOCABULARY))
    [batches] = pack(scored, every, "teacher", VOCABULARY, num_ranks=1, max_tokens=14)
    assert len(batches) > 1
    return batches


def gradients(model):
    for batch in micro_batches():
        model(batch)[0].backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


def test_activation_checkpointing_runs_each_layer_twice_and_leaves_the_gradients_as_they_are(path):
    model = sharded(path, checkpointing=True)
    calls = []
    for layer in model.causal_lm.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model)
    assert len(model.causal_lm.model.layers) == 2
    assert len(calls) == 2 * len(model.causal_lm.model.layers) * len(micro_batches())
    assert_equal(found, gradients(sharded(path)))


def step(model, **settings):
    cfg = LearnerConfig(schedule="constant", **settings)
    optimizer = build_optimizer(model.parameters(), cfg)
    scheduler = build_scheduler(optimizer, cfg, 10)
    return [train_step(model, optimizer, scheduler, micro_batches(), device=CPU, max_grad_norm=1.0) for _ in range(3)]


def full(model):
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def test_cpu_offload_takes_the_same_steps(path):
    """Here weights are on the CPU in any case; that they leave a GPU is untested."""
    offloaded, plain = sharded(path, cpu_offload=True), sharded(path)
    assert step(offloaded, learning_rate=1e-3) == step(plain, learning_rate=1e-3)
    assert_equal(full(offloaded), full(plain))


def test_bfloat16_computes_in_bfloat16_and_keeps_updates_that_bfloat16_would_lose(path):
    model = sharded(path, dtype="bfloat16")
    seen = set()
    layer = model.causal_lm.model.layers[0]
    layer.self_attn.q_proj.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    before = full(model)
    step(model, learning_rate=1e-6)
    after = full(model)
    assert seen == {torch.bfloat16}
    assert {w.dtype for w in after.values()} == {torch.float32}
    name = "causal_lm.model.layers.0.mlp.up_proj.weight"
    large = before[name].abs() > 0.01  # half a unit in bfloat16's last place is 2e-5 there, Adam's three steps 3e-6
    assert (after[name] != before[name])[large].float().mean() > 0.9
    assert torch.equal(after[name].bfloat16()[large], before[name].bfloat16()[large])


@pytest.mark.parametrize("call", ["forward", "token_stats"])
def test_a_bfloat16_student_gets_the_teachers_figures_as_they_were_given(path, call):
    """Rounded to bfloat16 a log-probability of -10 errs by up to 0.03 nats."""
    seen = {}
    model = sharded(path, dtype="bfloat16")
    hidden = model._hidden

    def watched(batch):
        seen.update({name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)})
        return hidden(batch)

    model._hidden = watched
    batch = micro_batches()[0]
    temperature_N = torch.linspace(0.51, 1.93, len(batch.row_N))
    batch = replace(batch, temperature_N=temperature_N)
    getattr(model, "__call__" if call == "forward" else call)(batch)
    for name in ("teacher_logprobs_NB", "weight_N", "temperature_N"):
        assert torch.equal(seen[name], getattr(batch, name)), name
    assert seen["teacher_logprobs_NB"].dtype == torch.float32


def compiled_losses(path, **settings):
    model = sharded(path, **settings)
    return [model(batch)[0].item() for batch in micro_batches()], model


def test_the_layers_are_compiled_where_that_is_asked_for(path, monkeypatch):
    """Each by itself and before FSDP2 wraps it; that it computes the same is in the long tests."""
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: seen.append((self, options, type(self))))
    model = sharded(path, compile_layers=True)
    assert [layer for layer, _, _ in seen] == list(model.causal_lm.model.layers)
    assert all(options == {"dynamic": True} and not issubclass(kind, FSDPModule) for _, options, kind in seen)
    sharded(path)
    assert len(seen) == 2


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_layer_is_compiled_and_gives_the_same_losses_and_gradients(path, checkpointing, monkeypatch):
    """With a backend that runs what was traced as it is."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compile_layer = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **options: compile_layer(self, backend=backend, **options)
    )
    torch._dynamo.reset()
    found, model = compiled_losses(path, compile_layers=True, checkpointing=checkpointing)
    expected, plain = compiled_losses(path, checkpointing=checkpointing)
    assert found == pytest.approx(expected, rel=1e-5)
    assert graphs
    assert all(layer._compiled_call_impl is not None for layer in model.causal_lm.model.layers)
    wanted = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_layers_compiled_for_the_cpu_give_the_same_losses(path):
    torch._dynamo.reset()
    assert compiled_losses(path, compile_layers=True)[0] == pytest.approx(compiled_losses(path)[0], rel=1e-5)
