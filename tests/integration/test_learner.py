"""FSDP2 ranks on Ray actors (gloo) against a plain model, sequence by sequence, with autograd through full logits."""

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from opsd.config import LearnerConfig, StudentConfig
from opsd.data.packing import build_sequences, pack
from opsd.learner.worker import LearnerWorker
from opsd.ops.divergences import DIVERGENCES
from opsd.placement import ray_cluster, start_actor
from opsd.types import Selection, Vocabulary
from tests.opsd.builders import scored_rollouts
from tests.tiny_models import make_tiny_qwen3

VOCABULARY = Vocabulary(size=60, stop_ids=(0, 5))  # the model has 64 rows: four of them are padding
LENGTHS = [5, 1, 9, 4, 7, 12]
TIMEOUT_S = 240  # a collective that one rank skips would wait for ever


class GradientWorker(LearnerWorker):
    """Also shows the gradients of a step without taking it."""

    def gradients(self, micro_batches):
        for batch in micro_batches:
            loss, _ = self.model(batch)
            loss.backward()
        found = {name.removeprefix("causal_lm."): p.grad.full_tensor() for name, p in self.model.named_parameters()}
        self.optimizer.zero_grad()
        return found


@pytest.fixture(scope="module")
def actors():
    with ray_cluster(dashboard=False):
        yield [
            start_actor(GradientWorker, f"rank-{i}", num_gpus=0, environment={"OMP_NUM_THREADS": "1"}) for i in range(2)
        ]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    make_tiny_qwen3(path, vocab_size=64, tied=request.param, seed=3, eos_token_id=0)
    return str(path)


def collective(actors, method, *per_rank):
    refs = [getattr(actor, method).remote(*(args[i] for args in per_rank)) for i, actor in enumerate(actors)]
    return ray.get(refs, timeout=TIMEOUT_S)


def start(actors, model_path):
    address = actors[0].free_address.remote()
    refs = [
        actor.start.remote(
            rank=rank,
            num_ranks=len(actors),
            address=address,
            device="cpu",
            student=StudentConfig(path=model_path),
            learner=LearnerConfig(learning_rate=1e-4),
            num_steps=4,
            divergence=DIVERGENCES["reverse_kl"],
            vocabulary=VOCABULARY,
        )
        for rank, actor in enumerate(actors)
    ]
    ray.get(refs, timeout=TIMEOUT_S)


def sequences(keep):
    scored = scored_rollouts(LENGTHS, VOCABULARY)
    index = torch.tensor([i for i in range(sum(LENGTHS)) if keep(i)])
    return build_sequences(scored, Selection(index_N=index, weight_N=1.0 + (index % 3).float()), "teacher", VOCABULARY)


def plain_gradients(model_path, kept):
    """Full logits, one sequence at a time, merged stop ids and masked padding done on dense probabilities."""
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    for sequence in kept:
        logits = model(torch.from_numpy(sequence.token_ids).long()[None]).logits[0, sequence.row_N].double()
        probs = torch.softmax(logits[:, : VOCABULARY.size], -1)
        stop = probs[:, list(VOCABULARY.stop_ids)].sum(-1, keepdim=True)
        probs = torch.cat([stop, probs[:, 1:5], torch.zeros_like(stop), probs[:, 6:]], 1)
        support = torch.from_numpy(sequence.support_NU)
        named = probs.gather(1, support.clamp_min(0)) * (support >= 0)
        student = torch.cat([named, 1 - named.sum(-1, keepdim=True)], 1)
        teacher = torch.from_numpy(sequence.teacher_logprobs_NB).double().exp()
        both = (student > 0) & (teacher > 0)
        ratio = torch.where(both, student, 1.0).log() - torch.where(both, teacher, 1.0).log()
        (torch.from_numpy(sequence.weight_N) * (student * ratio).sum(-1)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def every_second(index):
    return index % 2 == 0


@pytest.mark.parametrize("max_tokens", [10_000, 16, 1])
def test_gradients_do_not_depend_on_packing_or_ranks(actors, model_path, max_tokens):
    kept = sequences(every_second)
    expected = plain_gradients(model_path, kept)
    start(actors[:1], model_path)
    [alone] = collective(actors[:1], "gradients", pack(kept, 1, max_tokens))
    collective(actors[:1], "stop")
    assert_same_gradients(alone, expected)
    start(actors, model_path)
    for found in collective(actors, "gradients", pack(kept, 2, max_tokens)):
        assert_same_gradients(found, expected)
    collective(actors, "stop")


def test_a_rank_that_keeps_no_token_takes_part(actors, model_path):
    kept = sequences(lambda index: index == 8)
    assert len(kept) == 1
    expected = plain_gradients(model_path, kept)
    start(actors, model_path)
    for found in collective(actors, "gradients", pack(kept, 2, 100)):
        assert_same_gradients(found, expected)
    collective(actors, "stop")


def test_steps_and_checkpoints_agree_over_ranks(actors, model_path, tmp_path):
    """Two ranks step as one; a checkpoint of two ranks goes on at one with the same losses."""
    kept = sequences(every_second)
    start(actors[:1], model_path)
    alone = [collective(actors[:1], "train_step", pack(kept, 1, 20))[0] for _ in range(4)]
    collective(actors[:1], "stop")
    start(actors, model_path)
    together = [collective(actors, "train_step", pack(kept, 2, 20))[0] for _ in range(2)]
    collective(actors, "save", [tmp_path / "learner"] * 2)
    collective(actors, "stop")
    start(actors[:1], model_path)
    collective(actors[:1], "load", [tmp_path / "learner"])
    together += [collective(actors[:1], "train_step", pack(kept, 1, 20))[0] for _ in range(2)]
    collective(actors[:1], "stop")
    for one, two in zip(alone, together, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        assert two.learning_rate == one.learning_rate
    assert alone[-1].loss < alone[0].loss
