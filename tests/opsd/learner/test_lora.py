"""A LoRA student on one rank: what trains, what is kept, what engines and readers of an export get."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Phi3Config, Qwen2Config, Qwen3MoeConfig

import opsd.ops.head.buffer
from opsd.config.lora import LoraConfig
from opsd.config.run import LearnerConfig, StudentConfig
from opsd.errors import DataError
from opsd.learner.checkpoint import load_learner, part_of_checkpoint, read_adapter_facts, read_weights
from opsd.learner.loading import open_student
from opsd.learner.model import DistillationModel, all_tensors, full_weights, shard, trained_tensors
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.learner.packing import pack
from opsd.learner.step import token_stats, train_step
from opsd.learner.verify import keeps_sequences_apart, require_student_head
from opsd.models.lora import adapter_facts, is_adapter, save_adapter
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Selection, Vocabulary
from tests.opsd.builders import batch_of, scored_rollouts
from tests.opsd.process_group import one_rank
from tests.tiny_models import SIZES, make_tiny_qwen3

VOCABULARY = Vocabulary(size=64, stop_ids=(0,))
CPU = torch.device("cpu")
LENGTHS = [5, 9, 7]
KINDS = {
    "with biases": Qwen2Config(**SIZES),
    "fused projections": Phi3Config(**SIZES),
    "a mixture": Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, decoder_sparse_step=1
    ),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return str(make_tiny_qwen3(folder, tied=True, layers=2, seed=3, eos_token_id=0, scale=2.0))


@pytest.fixture(autouse=True)
def alone():
    with one_rank():
        yield


class Learner:
    def __init__(self, path, *, dtype="float32", seed=0, rate=0.05, lora=None, **sharding):
        self.student = StudentConfig(path=path, dtype=dtype, lora=lora or LoraConfig(rank=4, alpha=8.0))
        causal_lm = open_student(self.student, rank=0, device="cpu", seed=seed)
        self.model = DistillationModel(causal_lm, reverse_kl, VOCABULARY)
        shard(self.model, device="cpu", num_ranks=1, dtype=dtype, **sharding)
        cfg = LearnerConfig(learning_rate=rate, schedule="constant")
        self.optimizer = build_optimizer(self.model.parameters(), cfg)
        self.scheduler = build_scheduler(self.optimizer, cfg, 9)
        scored = batch_of(scored_rollouts(LENGTHS, VOCABULARY))
        every = Selection(index_N=torch.arange(sum(LENGTHS)), weight_N=torch.ones(sum(LENGTHS)))
        [self.batches] = pack(scored, every, "teacher", VOCABULARY, num_ranks=1, max_tokens=16)

    def step(self):
        return train_step(self.model, self.optimizer, self.scheduler, self.batches, device=CPU, max_grad_norm=1.0)

    def part(self, **settings):
        facts = adapter_facts(self.student)
        return part_of_checkpoint(self.model, self.optimizer, self.scheduler, None, adapter=facts, **settings)

    def load(self, folder):
        load_learner(folder, self.model, self.optimizer, self.scheduler, None)

    def tensors(self):
        return {name: p.full_tensor().detach().clone() for name, p in self.model.named_parameters()}

    def weights(self):
        merged = full_weights(all_tensors(self.model), torch.float32, self.student.lora.scale)
        return {name: weight.clone() for name, weight in merged}

    def logprobs(self):
        index, stats = token_stats(self.model, self.batches, device=CPU)
        return stats.student_logprob_T[index.argsort()]


def test_three_steps_change_the_adapter_and_nothing_else(path):
    learner = Learner(path)
    before, losses = learner.tensors(), [learner.step().loss for _ in range(3)]
    after = learner.tensors()
    assert losses[2] < losses[0]
    assert sum(map(is_adapter, after)) == 2 * 7 * 2, "both factors beside seven layers, twice"
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) != is_adapter(name), name
    assert {id(p) for group in learner.optimizer.param_groups for p in group["params"]} == {
        id(p) for name, p in learner.model.named_parameters() if is_adapter(name)
    }


def test_the_first_student_is_its_base_and_equal_seeds_give_equal_adapters(path):
    state = torch.get_rng_state()
    one, same, other = (Learner(path, seed=seed).tensors() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name in filter(is_adapter, one):
        assert torch.equal(one[name], same[name])
        assert torch.equal(one[name], other[name]) == ("lora_B" in name)
    base = AutoModelForCausalLM.from_pretrained(path).state_dict()
    for name, weight in Learner(path).weights().items():
        assert torch.equal(weight, base[name]), name


def test_no_memory_is_taken_for_the_gradient_of_the_frozen_head(path, monkeypatch):
    made = []

    class Watched(opsd.ops.head.buffer.HeadBuffer):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            made.append(self.gradient_VD)

    monkeypatch.setattr("opsd.ops.head.gradients.HeadBuffer", Watched)
    learner = Learner(path)
    learner.step()
    assert made == [None] * len(learner.batches)
    assert learner.model.causal_lm.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_and_adapter_give_the_learners_log_probabilities(kind, tmp_path):
    """Layers with a bias, several in one, and a mixture, whose experts are no linear layers and stay as they are."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(KINDS[kind]).save_pretrained(tmp_path / "base")
    learner = Learner(str(tmp_path / "base"))
    require_student_head(learner.model, learner.student.path, CPU)
    assert keeps_sequences_apart(learner.model, "float32", CPU)
    first = learner.logprobs()
    for _ in range(3):
        learner.step()
    expected = learner.logprobs()
    assert (expected - first).abs().max() > 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.load_state_dict(learner.weights(), strict=False).unexpected_keys == []
    torch.testing.assert_close(reader_logprobs(model, learner), expected, rtol=0, atol=1e-4)
    adapter = {name.removeprefix("causal_lm."): p.full_tensor() for name, p in trained_tensors(learner.model)}
    save_adapter(tmp_path / "adapter", adapter, learner.student.lora, learner.student.path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    found = reader_logprobs(PeftModel.from_pretrained(base, tmp_path / "adapter"), learner)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def reader_logprobs(model, learner):
    """Of the sampled tokens, as the statistics have them: the event that is first in every support."""
    found, index = [], []
    for batch in learner.batches:
        starts = batch.cu_seq_lens.tolist()
        for start, end in zip(starts, starts[1:], strict=False):
            rows = (batch.row_N >= start) & (batch.row_N < end)
            with torch.no_grad():
                logprobs = model.eval()(batch.token_ids_L[None, start:end]).logits[0].log_softmax(-1)
            kept = logprobs[batch.row_N[rows] - start]
            found.append(kept.gather(1, batch.support_NU[rows, :1])[:, 0])
            index.append(batch.index_N[rows])
    return torch.cat(found)[torch.cat(index).argsort()]


@pytest.mark.parametrize("settings", [{"checkpointing": True}, {"cpu_offload": True}], ids=["checkpointing", "offload"])
def test_what_saves_memory_changes_no_step(path, settings):
    plain, saving = Learner(path), Learner(path, **settings)
    assert [plain.step().loss for _ in range(3)] == [saving.step().loss for _ in range(3)]


def test_frozen_weights_are_kept_as_they_compute_and_the_adapter_in_float32(path):
    learner = Learner(path, dtype="bfloat16", rate=0.01)
    losses = [learner.step().loss for _ in range(4)]
    assert losses[3] < losses[0]
    for name, parameter in learner.model.named_parameters():
        assert parameter.dtype == (torch.float32 if is_adapter(name) else torch.bfloat16), name
    exact, name = learner.weights(), "model.layers.1.mlp.up_proj.weight"
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
    assert not torch.equal(exact[name], exact[name].bfloat16().float()), "merged in float32"
    assert torch.equal(exact["model.norm.weight"], base["model.norm.weight"].float())


def test_a_checkpoint_has_the_adapter_alone_and_goes_on_from_it(path, tmp_path):
    saved = Learner(path)
    for _ in range(2):
        saved.step()
    saved.part().write(tmp_path)
    assert all(map(is_adapter, read_weights(tmp_path)))
    assert read_adapter_facts(tmp_path) == adapter_facts(saved.student)
    expected = [saved.step().loss for _ in range(2)]
    loaded = Learner(path, seed=5)
    loaded.load(tmp_path)
    assert [loaded.step().loss for _ in range(2)] == expected
    for name, weight in loaded.tensors().items():
        assert torch.equal(weight, saved.tensors()[name]), name


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoraConfig(rank=2), r"lora_A.default.weight: shape .4, \d+. in the checkpoint, shape .2, \d+. in this run"),
        (LoraConfig(rank=4, targets=["q_proj"]), "in the checkpoint, missing in this run"),
    ],
)
def test_another_adapter_is_refused(path, tmp_path, lora, said):
    learner = Learner(path)
    learner.step()
    learner.part().write(tmp_path)
    with pytest.raises(DataError, match=said):
        Learner(path, lora=lora).load(tmp_path)


def test_the_whole_student_and_an_adapter_do_not_load_each_other(path, tmp_path):
    learner = Learner(path)
    learner.part().write(tmp_path)
    with pytest.raises(DataError, match="the checkpoint is of another learner"):
        Learner(path, lora=LoraConfig()).load(tmp_path)
    assert adapter_facts(replace(learner.student, lora=LoraConfig())) is None
