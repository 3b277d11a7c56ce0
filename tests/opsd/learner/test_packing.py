"""Kept tokens arrive in the micro-batches with their own row, support and weight, wherever they are packed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from opsd.errors import StageError
from opsd.learner.packing import pack, pack_whole
from opsd.ops import align
from opsd.ops.losses.objective import PACKED_INPUTS, RESIDUAL_INPUTS, ROLLOUT_LOGPROB
from opsd.payload.kept import kept_buckets
from opsd.types import Mixture, Selection, Vocabulary
from tests.opsd.builders import batch_of, scored_rollouts

VOCABULARY = Vocabulary(size=20, stop_ids=(0,))
LENGTHS = [5, 1, 9, 4, 7]


def random_batch(lengths):
    return batch_of(scored_rollouts(lengths, VOCABULARY))


def packed(scored, selection, num_ranks=1, max_tokens=10_000):
    return pack(scored, selection, "teacher", VOCABULARY, num_ranks=num_ranks, max_tokens=max_tokens)


def kept_rows(micro_batches):
    """(tokens up to the predicting row, its support, its weight) of every kept row, in an order of its own."""
    rows = []
    for batch in micro_batches:
        starts = (batch.position_L == 0).nonzero()[:, 0]
        for n, row in enumerate(batch.row_N.tolist()):
            start = starts[starts <= row].max().item()
            context = tuple(batch.token_ids_L[start : row + 1].tolist())
            rows.append((context, tuple(batch.support_NU[n].tolist()), round(batch.weight_N[n].item(), 6)))
    return sorted(rows)


def every_second(scored):
    index = torch.arange(0, sum(LENGTHS), 2)
    return Selection(index_N=index, weight_N=1.0 + index.float())


def test_a_batch_of_many_groups_has_the_buckets_of_one(monkeypatch):
    scored = random_batch(LENGTHS)
    index = np.array([0, 4, 5, 6, 17, 18, 25])
    together = kept_buckets(scored, index, "teacher", VOCABULARY)
    monkeypatch.setattr(align, "GROUP_TOKENS", 6)  # [5, 1], [9], [4, 7]
    for found, expected in zip(kept_buckets(scored, index, "teacher", VOCABULARY), together, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_each_kept_row_has_its_own_hidden_states(dtype):
    """Those of token t of the whole batch are all t; as uint16 they are the bits of a bfloat16."""
    scored = random_batch(LENGTHS)
    items, start = [], 0
    for item in scored.items:
        number_T = np.arange(start, start + len(item.rollout))
        hidden = np.repeat(number_T[:, None], 3, axis=1)
        if dtype == np.uint16:
            hidden = torch.from_numpy(hidden).to(torch.bfloat16).view(torch.uint16).numpy()
        items.append(replace(item, scores=replace(item.scores, hidden=hidden.astype(dtype))))
        start += len(item.rollout)
    batches = pack(
        batch_of(items), every_second(scored), "sampled", VOCABULARY, num_ranks=2, max_tokens=12, with_hidden=True
    )
    seen = []
    for batch in (batch for rank in batches for batch in rank):
        assert batch.teacher_hidden_NE.dtype == (torch.bfloat16 if dtype == np.uint16 else torch.float32)
        assert batch.support_NU.shape == (len(batch.row_N), 1)
        assert torch.equal(batch.teacher_hidden_NE, batch.index_N[:, None].expand(-1, 3).to(batch.teacher_hidden_NE))
        seen += batch.index_N.tolist()
    assert sorted(seen) == list(range(0, sum(LENGTHS), 2))


def test_each_kept_row_sees_its_own_context_and_support():
    scored = random_batch(LENGTHS)
    selection = every_second(scored)
    flat = [(item, t) for item in scored.items for t in range(len(item.rollout))]
    total = selection.weight_N.sum()
    expected = []
    for index, weight in zip(selection.index_N.tolist(), selection.weight_N, strict=True):
        item, t = flat[index]
        context = [*item.rollout.prompt.token_ids.tolist(), *item.rollout.response_ids[:t].tolist()]
        expected.append((tuple(context), item.rollout.response_ids[t], round((weight / total).item(), 6)))
    [[batch]] = packed(scored, selection)
    got = [(context, support[0], weight) for context, support, weight in kept_rows([batch])]
    assert got == sorted(expected)


def test_the_student_is_trained_after_its_own_prompt_whatever_the_teacher_saw():
    scored = random_batch(LENGTHS)
    shown = []
    for length, item in zip([1, 9, 3, 2, 6], scored.items, strict=True):
        prompt = replace(item.rollout.prompt, teacher_token_ids=np.full(length, 19, np.int32))
        shown.append(replace(item, rollout=replace(item.rollout, prompt=prompt)))
    selection = every_second(scored)
    assert kept_rows(packed(batch_of(shown), selection)[0]) == kept_rows(packed(scored, selection)[0])


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 13, 10_000])
def test_packing_moves_rows_but_changes_none(num_ranks, max_tokens):
    scored = random_batch(LENGTHS)
    by_rank = packed(scored, every_second(scored), num_ranks, max_tokens)
    assert len({len(batches) for batches in by_rank}) == 1, "every rank must run as many micro-batches"
    whole = kept_rows([batch for [batch] in packed(scored, every_second(scored))])
    assert kept_rows([batch for batches in by_rank for batch in batches]) == whole
    for batch in (batch for batches in by_rank for batch in batches):
        num_sequences = int((batch.position_L == 0).sum())
        assert len(batch.token_ids_L) <= max_tokens or num_sequences == 1


@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(1, 10_000), (3, 13)])
def test_temperatures_and_inputs_stay_with_their_tokens(num_ranks, max_tokens):
    scored = random_batch(LENGTHS)
    index = torch.arange(0, sum(LENGTHS), 2)
    selection = Selection(
        index_N=index,
        weight_N=torch.ones(len(index)),
        temperature_N=0.5 + index.float(),
        inputs={"advantage_N": -index.float(), "wrong_N": index % 4 == 0},
    )
    by_rank = packed(scored, selection, num_ranks, max_tokens)
    batches = [batch for batches in by_rank for batch in batches]
    assert sum(len(batch.index_N) for batch in batches) == len(index)
    for batch in batches:
        assert torch.equal(batch.temperature_N, 0.5 + batch.index_N.float())
        assert torch.equal(batch.inputs["advantage_N"], -batch.index_N.float())
        assert torch.equal(batch.inputs["wrong_N"], batch.index_N % 4 == 0)
    assert all(b.to("cpu").inputs.keys() == {"advantage_N", "wrong_N"} for b in batches)


@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(1, 10_000), (3, 13)])
def test_the_inputs_of_draws_stay_with_their_tokens(num_ranks, max_tokens, monkeypatch):
    """Of each kept token alone, in whatever group, rank and micro-batch it lands."""
    scored = random_batch(LENGTHS)
    [rows] = align.TokenRows.in_groups(scored.items, VOCABULARY)
    outside, tail = align.sampled_outside(rows, "teacher", VOCABULARY)
    assert 0 < outside.sum() < len(outside)
    sampled = np.concatenate([rollout.sampled_logprobs for rollout in scored.rollouts])
    monkeypatch.setattr(align, "GROUP_TOKENS", 6)
    selection = replace(every_second(scored), inputs={"advantage_N": torch.ones(13)})
    ranks = {"num_ranks": num_ranks, "max_tokens": max_tokens}
    by_rank = pack(scored, selection, "teacher", VOCABULARY, **ranks, asked=PACKED_INPUTS)
    batches = [batch for batches in by_rank for batch in batches]
    assert sum(len(batch.index_N) for batch in batches) == len(selection)
    for batch in batches:
        assert batch.inputs.keys() == {"advantage_N", "outside_N", "teacher_tail_N", ROLLOUT_LOGPROB}
        assert batch.inputs[ROLLOUT_LOGPROB].tolist() == sampled[batch.index_N].tolist()
        assert batch.inputs["outside_N"].tolist() == outside[batch.index_N].tolist()
        assert batch.inputs["teacher_tail_N"].tolist() == tail[batch.index_N].tolist()


@pytest.mark.parametrize(
    "change",
    [{"policy_version": -1}, {"mixture": Mixture(other_ids=np.zeros(7, np.int32), own_share=0.5)}],
    ids=["another's", "mixed"],
)
@pytest.mark.parametrize(
    ("setting", "asked"), [("loss.residual=true", RESIDUAL_INPUTS), ("loss.importance_cap", {ROLLOUT_LOGPROB})]
)
def test_a_loss_of_draws_learns_from_no_answer_but_the_students(change, setting, asked):
    first, second = random_batch([4, 4]).items
    scored = batch_of([first, replace(second, rollout=replace(second.rollout, **change))])
    selection = Selection(index_N=torch.arange(8), weight_N=torch.ones(8))
    with pytest.raises(StageError, match=f"{setting} learns from the student's own answers alone"):
        pack_whole(scored, selection, "teacher", VOCABULARY, asked=asked)
    pack_whole(scored, selection, "teacher", VOCABULARY)


def test_trunk_stops_at_the_last_kept_row_and_skips_rollouts_that_keep_nothing():
    scored = random_batch(LENGTHS)
    selection = Selection(index_N=torch.tensor([1, 7]), weight_N=torch.ones(2))  # rollout 0 token 1, rollout 2 token 1
    whole = pack_whole(scored, selection, "teacher", VOCABULARY)
    assert whole.cu_seq_lens.diff().tolist() == [2 + 1, 4 + 1]  # prompt tokens and one response token
    assert whole.row_N.tolist() == [2, 3 + 4]
    [batches] = packed(scored, selection, max_tokens=0)
    assert [batch.row_N.tolist() for batch in batches] == [[4], [2]]  # the longer one first


def test_more_ranks_than_sequences_gives_empty_micro_batches():
    scored = random_batch([3])
    by_rank = packed(scored, Selection(index_N=torch.tensor([0]), weight_N=torch.ones(1)), 3, 100)
    assert sorted(len(batch.row_N) for [batch] in by_rank) == [0, 0, 1]
    empty = min((batch for [batch] in by_rank), key=lambda batch: len(batch.row_N))
    [[full]] = [batches for batches in by_rank if len(batches[0].row_N)]
    assert empty.teacher_logprobs_NB.shape == (0, full.teacher_logprobs_NB.shape[1])
    assert len(empty.token_ids_L) == empty.max_length == 1


def test_load_is_balanced_over_ranks():
    lengths = np.random.default_rng(0).integers(2, 60, 40).tolist()
    scored = random_batch(lengths)
    everything = Selection(index_N=torch.arange(sum(lengths)), weight_N=torch.ones(sum(lengths)))
    loads = [sum(len(b.token_ids_L) for b in batches) for batches in packed(scored, everything, num_ranks=4)]
    assert max(loads) - min(loads) <= pack_whole(scored, everything, "teacher", VOCABULARY).max_length
