"""FSDP2 ranks on Ray actors (gloo) against a plain model, sequence by sequence, with autograd through full logits."""

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from opsd.batch import held_here
from opsd.cluster.ray import ray_cluster, start_actor
from opsd.config.lora import LoraConfig
from opsd.config.run import LearnerConfig, StudentConfig
from opsd.learner.group import LearnerGroup
from opsd.learner.worker import LearnerWorker
from opsd.ops.losses.divergences import DIVERGENCES
from opsd.payload.kept import kept_buckets
from opsd.types import ScoredRollout, Selection
from tests.integration.learner_reference import LENGTHS, VOCABULARY, packed, plain_gradients
from tests.opsd.builders import make_scored, merge_stops, random_logprobs
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

pytestmark = pytest.mark.slow
LORA_OFF = LoraConfig()
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

    def stop(self):
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def cluster(joined):
    with ray_cluster(dashboard=False):
        yield


@pytest.fixture(scope="module")
def actors(cluster):
    environment = {"OMP_NUM_THREADS": "1"}
    return [start_actor(GradientWorker, f"rank-{i}", num_gpus=0, environment=environment) for i in range(2)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_path(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("student")
    make_tiny_qwen3(path, vocab_size=64, tied=request.param, seed=3, eos_token_id=0)
    return str(path)


def collective(actors, method, *per_rank):
    refs = [getattr(actor, method).remote(*(args[i] for args in per_rank)) for i, actor in enumerate(actors)]
    return ray.get(refs, timeout=TIMEOUT_S)


def start(actors, model_path, mean_decay=None, lora=LORA_OFF):
    address = actors[0].rendezvous.remote(len(actors))
    refs = [
        actor.start.remote(
            rank=rank,
            num_ranks=len(actors),
            address=address,
            device="cpu",
            student=StudentConfig(path=model_path, lora=lora),
            learner=LearnerConfig(learning_rate=1e-3 if lora.rank else 1e-4),
            num_steps=4,
            divergence=DIVERGENCES["reverse_kl"],
            vocabulary=VOCABULARY,
            mean_decay=mean_decay,
        )
        for rank, actor in enumerate(actors)
    ]
    ray.get(refs, timeout=TIMEOUT_S)


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-5, f"{name}: relative error {error:.1e}"


def own_rollouts(model, lengths, *, num_known):
    """Rollouts with this model's true log-probabilities, and their dense ones (float64 [T, V] each, stop ids merged).

    The teacher is random; it knows its `num_known` likeliest events, and the rollouts that many of the student's.
    """
    scored, students, teachers = [], [], []
    for seed, length in enumerate(lengths):
        response = torch.randint(0, VOCABULARY.size, (length,), generator=torch.Generator().manual_seed(seed))
        context = torch.cat([torch.arange(1, 4), response])  # make_scored's prompt of three tokens
        with torch.no_grad():
            logits = model(context[None]).logits[0, 2:-1]
        student = merge_stops(logits.double(), VOCABULARY)
        teacher = merge_stops(random_logprobs(length, VOCABULARY.size, seed), VOCABULARY)
        rollout, scores = make_scored(
            student, teacher, response.tolist(), num_candidates=num_known, top_k=num_known, vocabulary=VOCABULARY
        )
        scored.append(ScoredRollout(rollout=rollout, scores=scores))
        students.append(student)
        teachers.append(teacher)
    return held_here(scored, VOCABULARY), torch.cat(students), torch.cat(teachers)


def dense_stats(scored, student_TV):
    """Entropy over the whole vocabulary; both divergences on the loss's buckets, from dense probabilities."""
    probs_TV = student_TV.exp()
    entropy = torch.special.entr(probs_TV).sum(-1) / torch.tensor(float(VOCABULARY.size)).log()
    buckets = kept_buckets(scored.payloads[0].whole(), np.arange(len(student_TV)), "teacher", VOCABULARY)
    support, teacher = torch.from_numpy(buckets[0]), torch.from_numpy(buckets[1]).double().exp()
    named = probs_TV.gather(1, support.clamp_min(0)) * (support >= 0)
    student = torch.cat([named, (1 - named.sum(-1, keepdim=True)).clamp_min(0)], 1)

    def kl(p, q):
        return (torch.xlogy(p, p) - torch.xlogy(p, q)).nan_to_num(nan=0.0).sum(-1)

    return entropy, kl(student, teacher), kl(teacher, student)


def assert_same_stats(found, expected):
    for value, other in zip((found.entropy_T, found.reverse_kl_T, found.forward_kl_T), expected, strict=True):
        torch.testing.assert_close(value.double(), other.double(), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=[1, 2], ids=["1-rank", "2-ranks"])
def group(cluster, model_path, request):
    found = LearnerGroup(
        StudentConfig(path=model_path),
        LearnerConfig(num_workers=request.param, micro_batch_tokens=16, learning_rate=1e-2, schedule="constant"),
        divergence=DIVERGENCES["reverse_kl"],
        support="teacher",
        vocabulary=VOCABULARY,
        num_steps=4,
        device="cpu",
    )
    found.wait_ready()
    yield found
    for worker in found.workers:
        ray.kill(worker)


def current_model(group, model_path):
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    model.load_state_dict(ray.get(group.weights("float32"), timeout=TIMEOUT_S), strict=False)  # a tied head comes once
    return model


def test_learner_stats_are_the_dense_ones_of_the_current_weights(group, model_path):
    """In the rollouts' order, before a step and after it."""
    scored, student, _ = own_rollouts(current_model(group, model_path), LENGTHS, num_known=8)
    assert_same_stats(group.token_stats(scored), dense_stats(scored, student))

    every = Selection(index_N=torch.arange(sum(LENGTHS)), weight_N=torch.ones(sum(LENGTHS)))
    report = group.train_step(scored, every)
    assert report.loss == pytest.approx(dense_stats(scored, student)[1].mean().item(), rel=1e-4)
    scored, moved, _ = own_rollouts(current_model(group, model_path), LENGTHS, num_known=8)
    assert (moved - student).nan_to_num().abs().max() > 0.1
    assert_same_stats(group.token_stats(scored), dense_stats(scored, moved))


def test_rollout_and_learner_stats_agree_where_every_event_is_known(group, model_path):
    """One rollout, so that one of two ranks has no token."""
    scored, student, teacher = own_rollouts(current_model(group, model_path), [9], num_known=VOCABULARY.size)
    from_rollouts = scored.tokens
    from_learner = group.token_stats(scored)
    for name, value in vars(from_rollouts).items():
        torch.testing.assert_close(getattr(from_learner, name), value, rtol=1e-4, atol=1e-4, msg=name)
    dense = torch.where(student.isneginf(), 0.0, student.exp() * (student - teacher.nan_to_num(neginf=0.0))).sum(-1)
    torch.testing.assert_close(from_rollouts.reverse_kl_T.double(), dense, rtol=1e-4, atol=1e-4)


def test_the_running_mean_follows_the_weights_and_survives_a_checkpoint(actors, model_path, tmp_path):
    def first(method, *arguments, ranks=actors):
        return collective(ranks, method, *([argument] * len(ranks) for argument in arguments))[0]

    start(actors, model_path, mean_decay=0.9)
    expected = first("gather_weights", "float32")
    for _ in range(2):
        collective(actors, "train_step", packed(2, 20, every_second))
        now = first("gather_weights", "float32")
        expected = {name: 0.9 * mean + 0.1 * now[name] for name, mean in expected.items()}
    torch.testing.assert_close(first("gather_weights", "float32", True), expected)
    assert any((expected[name] - now[name]).abs().max() > 1e-5 for name in now)
    first("save", tmp_path / "learner", False)
    first("saved", True)
    collective(actors, "stop")
    start(actors[:1], model_path, mean_decay=0.9)
    first("load", tmp_path / "learner", ranks=actors[:1])
    torch.testing.assert_close(first("gather_weights", "float32", True, ranks=actors[:1]), expected)
    collective(actors[:1], "stop")


def test_ranks_that_share_a_weight_unevenly_save_the_student(actors, tmp_path):
    """63 rows of the embedding over two ranks: one of them holds a padded row."""
    source = tmp_path / "odd"
    make_tiny_qwen3(source, vocab_size=63, tied=True, seed=3, eos_token_id=0)
    make_char_tokenizer(source, vocab_size=63, eos_token_id=0)
    start(actors, str(source))
    collective(actors, "save_student", [tmp_path / "saved"] * 2)
    collective(actors, "stop")
    saved, made = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tmp_path / "saved", source))
    torch.testing.assert_close(saved, made, rtol=0, atol=0)


def every_second(index):
    return index % 2 == 0


def by_index(index):
    return 0.5 + 0.1 * (index % 7).float()


@pytest.mark.parametrize(("max_tokens", "temperature"), [(10_000, None), (16, None), (1, None), (16, by_index)])
def test_gradients_do_not_depend_on_packing_or_ranks(actors, model_path, max_tokens, temperature):
    kept = every_second, temperature
    expected = plain_gradients(model_path, *kept)
    start(actors[:1], model_path)
    [alone] = collective(actors[:1], "gradients", packed(1, max_tokens, *kept))
    collective(actors[:1], "stop")
    assert_same_gradients(alone, expected)
    start(actors, model_path)
    for found in collective(actors, "gradients", packed(2, max_tokens, *kept)):
        assert_same_gradients(found, expected)
    collective(actors, "stop")


def test_a_rank_that_keeps_no_token_takes_part(actors, model_path):
    def the_ninth(index):
        return index == 8

    per_rank = packed(2, 100, the_ninth)
    assert sorted(len(batch.row_N) for [batch] in per_rank) == [0, 1]
    expected = plain_gradients(model_path, the_ninth)
    start(actors, model_path)
    for found in collective(actors, "gradients", per_rank):
        assert_same_gradients(found, expected)
    collective(actors, "stop")


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both(actors, model_path):
    """One rank's tokens alone have a NaN; the other would step without the first."""
    start(actors, model_path)
    before = collective(actors, "gather_weights", ["float32"] * 2)[0]
    per_rank = packed(2, 20, every_second)
    broken = [replace(batch, weight_N=batch.weight_N * float("nan")) for batch in per_rank[1]]
    reports = collective(actors, "train_step", [per_rank[0], broken])
    assert reports[0].skipped == reports[1].skipped
    assert reports[0].skipped.startswith("the loss is nan and the gradient norm is nan (the first such weight: model.")
    after = collective(actors, "gather_weights", ["float32"] * 2)[0]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    reports = collective(actors, "train_step", per_rank)
    assert [report.skipped for report in reports] == ["", ""]
    collective(actors, "stop")


@pytest.mark.parametrize("lora", [LORA_OFF, LoraConfig(rank=3)], ids=["whole", "lora"])
def test_steps_and_checkpoints_agree_over_ranks(actors, model_path, lora, tmp_path):
    """Two ranks step as one; a checkpoint of two ranks continues at one with the same losses. Three rows of an adapter
    are shared unevenly.
    """
    one_rank, two_ranks = packed(1, 20, every_second), packed(2, 20, every_second)
    start(actors[:1], model_path, lora=lora)
    alone = [collective(actors[:1], "train_step", one_rank)[0] for _ in range(4)]
    collective(actors[:1], "stop")
    start(actors, model_path, lora=lora)
    together = [collective(actors, "train_step", two_ranks)[0] for _ in range(2)]
    collective(actors, "save", [tmp_path / "learner"] * 2, [True] * 2)
    collective(actors, "saved", [True] * 2)
    collective(actors, "stop")
    start(actors[:1], model_path, lora=lora)
    collective(actors[:1], "load", [tmp_path / "learner"])
    together += [collective(actors[:1], "train_step", one_rank)[0] for _ in range(2)]
    collective(actors[:1], "stop")
    for one, two in zip(alone, together, strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-5)
        # AdamW's first steps go by signs, and near zero an adapter's gradients have them from the order of the sums.
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-3 if lora.rank else 1e-4)
        assert two.learning_rate == one.learning_rate
    assert alone[-1].loss < alone[0].loss
