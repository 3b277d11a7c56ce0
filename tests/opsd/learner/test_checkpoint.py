"""What a learner saves is what it loads, and what is not its own is refused before anything is changed."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from opsd.config.run import LearnerConfig
from opsd.errors import DataError
from opsd.learner.checkpoint import load_learner, part_of_checkpoint, read_weights
from opsd.learner.loading import load_student
from opsd.learner.mean import WeightMean
from opsd.learner.model import DistillationModel, shard
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.learner.shards import Shards, first_row
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Vocabulary
from tests.opsd.process_group import one_rank
from tests.tiny_models import make_tiny_qwen3


class Learner:
    """Model, optimiser, scheduler and a running mean, after some steps with gradients of a seed."""

    def __init__(self, path, steps=0, seed=0):
        causal_lm = load_student(str(path), attention="sdpa", trust_remote_code=False)
        self.model = DistillationModel(causal_lm, reverse_kl, Vocabulary(size=64, stop_ids=(0,)))
        shard(self.model, device="cpu", num_ranks=1, dtype="float32")
        self.optimizer = build_optimizer(self.model.parameters(), LearnerConfig(warmup_steps=3))
        self.scheduler = build_scheduler(self.optimizer, LearnerConfig(warmup_steps=3), 9)
        self.mean = WeightMean(self.model, 0.9)
        torch.manual_seed(seed)
        for _ in range(steps):
            self.step()

    def step(self):
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.scheduler.step()
        self.mean.update(self.model)

    @property
    def parts(self):
        return self.model, self.optimizer, self.scheduler, self.mean

    def tensors(self):
        """Everything that the next step depends on, as bytes."""
        found = dict(self.model.named_parameters())
        found |= {f"mean {name}": each for name, each in self.mean.shards.items()}
        for index, state in enumerate(self.optimizer.state.values()):
            found |= {f"{index} {name}": each for name, each in state.items()}
        whole = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in found.items()}
        return {name: each.detach().clone() for name, each in whole.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_qwen3(tmp_path_factory.mktemp("model"), tied=True, layers=2, seed=3, eos_token_id=0)


@pytest.fixture(autouse=True)
def alone():
    with one_rank():
        yield


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert torch.equal(found[name], each), name


@pytest.mark.parametrize("steps", [0, 4])
def test_a_loaded_learner_goes_on_as_the_saved_one(path, tmp_path, steps):
    saved = Learner(path, steps)
    part_of_checkpoint(*saved.parts).write(tmp_path)
    loaded = Learner(path, steps=2, seed=5)
    if steps == 0:
        loaded.optimizer.state.clear()
    load_learner(tmp_path, *loaded.parts)
    assert_equal(loaded.tensors(), saved.tensors())
    for learner in (saved, loaded):  # the generator of each goes on where it was
        load_learner(tmp_path, *learner.parts)
        learner.step()
    assert_equal(loaded.tensors(), saved.tensors())
    assert loaded.optimizer.param_groups[0]["lr"] == saved.optimizer.param_groups[0]["lr"]


def test_the_weights_are_read_without_a_learner(path, tmp_path):
    saved = Learner(path, 1)
    part_of_checkpoint(*saved.parts).write(tmp_path)
    found = read_weights(tmp_path)
    assert {f"causal_lm.{name}" for name in found} == {name for name, _ in saved.model.named_parameters()}
    assert torch.equal(found["model.norm.weight"], saved.tensors()["causal_lm.model.norm.weight"])


def rewritten(folder, change):
    """rank_0.safetensors anew, its tensors and header changed by `change(tensors, header)`."""
    file = folder / "rank_0.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        header = opened.metadata()
    change(tensors, header)
    save_file(tensors, file, metadata=header)


NORM = "weight.causal_lm.model.norm.weight"
MOMENT = "exp_avg.causal_lm.model.norm.weight"
CHANGES = {
    "a weight gone": (lambda t, h: t.pop(NORM), f"the first is {NORM}: missing in the checkpoint"),
    "a moment gone": (lambda t, h: t.pop(MOMENT), f"{MOMENT}: missing in the checkpoint, shape .* in this run"),
    "a mean gone": (lambda t, h: t.pop("mean.causal_lm.model.norm.weight"), "mean.* missing in the checkpoint"),
    "a weight more": (lambda t, h: t.update(x=torch.zeros(2)), r"x: shape \[2\] in the checkpoint, missing in this"),
    "another width": (lambda t, h: t.update({NORM: t[NORM][:-1].clone()}), rf"{NORM} has \d+ of its \d+ rows"),
    "no schedule": (lambda t, h: h.pop("scheduler"), "rank_0.safetensors does not say its scheduler"),
    "no word on moments": (lambda t, h: h.pop("moments"), "rank_0.safetensors does not say its moments"),
    "no places": (lambda t, h: h.pop("places"), "cannot read this learner's checkpoint"),
    "places that are none": (lambda t, h: h.update(places="[3]"), "cannot read this learner's checkpoint"),
    "rows of another rank gone": (
        lambda t, h: h.update(places=json.dumps({**json.loads(h["places"]), NORM: [0, 999]})),
        rf"{NORM} has \d+ of its 999 rows: is a rank's file missing",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_learners_checkpoint_is_refused_and_changes_nothing(path, tmp_path, name):
    part_of_checkpoint(*Learner(path, 1).parts).write(tmp_path)
    change, said = CHANGES[name]
    rewritten(tmp_path, change)
    learner = Learner(path, 2)
    before = learner.tensors()
    with pytest.raises(DataError, match=said):
        load_learner(tmp_path, *learner.parts)
    assert_equal(learner.tensors(), before)


def test_two_layers_do_not_go_into_one(path, tmp_path):
    part_of_checkpoint(*Learner(path, 1).parts).write(tmp_path / "c")
    shallow = Learner(make_tiny_qwen3(tmp_path / "m", tied=True, layers=1, seed=3, eos_token_id=0))
    with pytest.raises(DataError, match="layers.1.* in the checkpoint, missing in this run"):
        load_learner(tmp_path / "c", *shallow.parts)


@pytest.mark.parametrize("contents", [b"", b"\xff" * 99, pickle.dumps({"a": 1})], ids=["empty", "binary", "pickle"])
def test_a_file_that_is_no_safetensors_is_refused(path, tmp_path, contents):
    (tmp_path / "rank_0.safetensors").write_bytes(contents)
    for read in (lambda: read_weights(tmp_path), lambda: load_learner(tmp_path, *Learner(path).parts)):
        with pytest.raises(DataError, match="cannot read this learner's checkpoint"):
            read()
    with pytest.raises(DataError, match="not a learner checkpoint"):
        read_weights(tmp_path / "nothing")


@pytest.mark.parametrize(("num_rows", "num_ranks"), [(7, 2), (8, 3), (2, 4), (12, 4), (1, 1)])
def test_rows_of_any_number_of_ranks_are_one_tensor(tmp_path, num_rows, num_ranks):
    whole = torch.arange(num_rows * 3.0).reshape(num_rows, 3)
    parts = list(whole.chunk(num_ranks)) + [whole[:0]] * num_ranks
    for rank in range(num_ranks):
        places = json.dumps({"w": [first_row(num_rows, rank, num_ranks), num_rows]})
        save_file({"w": parts[rank].clone()}, tmp_path / f"rank_{rank}.safetensors", metadata={"places": places})
    with Shards(tmp_path) as stored:
        assert stored.shapes == {"w": (num_rows, 3)}
        assert torch.equal(stored.tensor("w"), whole)
        for first in range(num_rows + 1):
            for count in range(num_rows + 1 - first):
                assert torch.equal(stored.rows("w", first, count), whole[first : first + count])
    if num_rows == 8:
        (tmp_path / "rank_1.safetensors").unlink()
        with pytest.raises(DataError, match="w has 5 of its 8 rows: is a rank's file missing"):
            Shards(tmp_path)
