"""The learner's statistics on one process against dense probabilities: no Ray, no FSDP2."""
# T response tokens, V vocabulary

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from opsd.learner.model import DistillationModel
from opsd.learner.packing import pack
from opsd.ops.losses.divergences import reverse_kl
from opsd.ops.signals import STATISTICS
from opsd.payload.scored import rollout_stats
from opsd.types import Mixture, ScoredRollout, Selection, TokenStats, Vocabulary
from tests.opsd.builders import batch_of, make_scored, merge_stops, random_logprobs
from tests.tiny_models import make_tiny_qwen3

VOCABULARY = Vocabulary(size=60, stop_ids=(0, 5))  # the model has 64 rows: four of them are padding
RESPONSE = [4, 9, 5, 31, 17, 0]


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    path = make_tiny_qwen3(
        tmp_path_factory.mktemp("s"), vocab_size=64, width=32, layers=1, tied=True, seed=3, eos_token_id=0, scale=3.0
    )
    return AutoModelForCausalLM.from_pretrained(path).eval()


def rollout_of(student, num_known):
    """(a rollout with its scores, dense log-probabilities of student and teacher [T, V])."""
    context = torch.tensor([1, 2, 3, *RESPONSE])  # make_scored's prompt of three tokens
    with torch.no_grad():
        student_TV = merge_stops(student(context[None]).logits[0, 2:-1].double(), VOCABULARY)
    teacher_TV = merge_stops(random_logprobs(len(RESPONSE), VOCABULARY.size, 0), VOCABULARY)
    rollout, scores = make_scored(
        student_TV, teacher_TV, RESPONSE, num_candidates=num_known, top_k=num_known, vocabulary=VOCABULARY
    )
    return ScoredRollout(rollout=rollout, scores=scores), student_TV, teacher_TV


def packed(items, selection, num_ranks=1):
    return pack(batch_of(items), selection, "teacher", VOCABULARY, num_ranks=num_ranks, max_tokens=1000)


@torch.no_grad()
def learner_stats(student, item):
    everything = Selection(index_N=torch.arange(len(RESPONSE)), weight_N=torch.ones(len(RESPONSE)))
    [[batch]] = packed([item], everything)
    return DistillationModel(student, reverse_kl, VOCABULARY, STATISTICS).token_stats(batch)


def test_statistics_are_those_of_the_losss_buckets(student):
    """The sampled event and the teacher's eight likeliest by name, all others as one."""
    item, student_TV, teacher_TV = rollout_of(student, num_known=8)
    stats = learner_stats(student, item)
    for t, token in enumerate(RESPONSE):
        event = VOCABULARY.stop_event if token in VOCABULARY.stop_ids else token
        named = sorted({event, *item.scores.top_ids[t].tolist()})
        p, q = (torch.cat([x[t, named].exp(), 1 - x[t, named].exp().sum()[None]]) for x in (student_TV, teacher_TV))
        close = {"abs": 1e-4}
        assert stats.extra["hellinger_T"][t].item() == pytest.approx((1 - (p * q).sqrt().sum()).sqrt().item(), **close)
        divergence = (p * (p / q).log()).sum()
        assert stats.reverse_kl_T[t].item() == pytest.approx(divergence.item(), **close)
        gradient = p * ((p / q).log() - divergence)
        assert stats.extra["grad_norm_T"][t].item() == pytest.approx(gradient.norm().item(), **close)
        assert stats.named_mass_T[t].item() == pytest.approx(1 - p[-1].item(), **close)
        assert stats.student_logprob_T[t].item() == pytest.approx(student_TV[t, event].item(), **close)
        assert stats.teacher_logprob_T[t].item() == pytest.approx(teacher_TV[t, event].item(), **close)


def test_both_sources_agree_where_every_event_is_known(student):
    item, _, _ = rollout_of(student, num_known=VOCABULARY.size)
    from_learner, from_rollouts = (
        learner_stats(student, item).known(),
        rollout_stats(batch_of([item]), VOCABULARY, STATISTICS).known(),
    )
    # Neither candidates nor an order are part of a micro-batch.
    assert from_rollouts.keys() - from_learner.keys() == {"compatibility_T", "teacher_entropy_T"}
    assert {"hellinger_T", "grad_norm_T"} < from_learner.keys()
    for name, value in from_learner.items():
        torch.testing.assert_close(value, from_rollouts[name], rtol=1e-4, atol=1e-4, msg=name)


def test_a_rank_without_tokens_has_the_same_statistics(student):
    """So that the parts of all ranks can be put together."""
    item, _, _ = rollout_of(student, num_known=8)
    everything = Selection(index_N=torch.arange(len(RESPONSE)), weight_N=torch.ones(len(RESPONSE)))
    batches = packed([item], everything, num_ranks=2)
    model = DistillationModel(student, reverse_kl, VOCABULARY, STATISTICS)
    parts = [model.token_stats(batch) for [batch] in batches]
    assert sorted(len(part) for part in parts) == [0, len(RESPONSE)]
    assert len(TokenStats.concatenate(parts)) == len(RESPONSE)


def test_a_mixture_is_read_at_its_place_in_the_packed_row(student):
    """One rollout mixed, one not, one micro-batch: each as the plain model reads its own embeddings."""
    item, _, _ = rollout_of(student, num_known=8)
    context = torch.tensor([1, 2, 3, *RESPONSE])
    other_ids = torch.tensor([7, 8, 30, 31, 32, 33, 34, *RESPONSE[-2:]])
    mixture = Mixture(other_ids=other_ids.numpy().astype("int32"), own_share=0.7)
    mixed = replace(item, rollout=replace(item.rollout, mixture=mixture))
    kept = Selection(index_N=torch.tensor([0, 3, 6, 8, 10]), weight_N=torch.ones(5))
    [[batch]] = packed([item, mixed], kept)
    with torch.no_grad():
        stats = DistillationModel(student, reverse_kl, VOCABULARY).token_stats(batch)
        embed = student.get_input_embeddings()
        inputs = torch.stack([embed(context), 0.7 * embed(context) + 0.3 * embed(other_ids)])
        dense = student(inputs_embeds=inputs).logits[:, 2:-1].double()
    expected = torch.cat([merge_stops(rows_TV, VOCABULARY) for rows_TV in dense])
    for place, index in enumerate(batch.index_N.tolist()):
        token = RESPONSE[index % len(RESPONSE)]
        event = VOCABULARY.stop_event if token in VOCABULARY.stop_ids else token
        assert stats.student_logprob_T[place].item() == pytest.approx(expected[index, event].item(), abs=1e-4)
