"""The memory that shares and gradient have in common: its order is kept, and in that order nothing is overwritten."""
# N rows of a chunk, D width, V rows of the weight, C columns of a block

import pytest
import torch

from opsd.ops.head import chunks as head_chunks
from opsd.ops.head import gradients as head_gradients
from opsd.ops.head import loss as head_loss
from opsd.ops.head.buffer import HeadBuffer, rows_in_gradient
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import reverse_kl
from tests.opsd.ops.head.reference import dense_buckets, make_head, make_support

VOCAB = 10
BLOCKS = first, second, _ = slice(0, 4), slice(4, 8), slice(8, 10)
PUT = [("put", columns) for columns in BLOCKS]


def make_buffer(rows=VOCAB, width=3, *, needs_gradient=True, in_blocks=True):
    weight_VD = torch.zeros(rows, width)
    return HeadBuffer(
        weight_VD, vocab_size=VOCAB, dtype=torch.float32, needs_gradient=needs_gradient, in_blocks=in_blocks
    )


def put_all(buffer, num_rows):
    """A chunk whose shares are distinct numbers; those numbers, block after block."""
    buffer.begin(num_rows)
    shares_NV = torch.arange(1.0, num_rows * VOCAB + 1).view(num_rows, VOCAB)
    shares = [shares_NV[:, columns] for columns in BLOCKS]
    for columns, share_NC in zip(BLOCKS, shares, strict=True):
        buffer.put(columns).copy_(share_NC)
    return shares


@pytest.mark.parametrize("width", [1, 2, 3, 20])
@pytest.mark.parametrize("padding", [0, 7])
def test_the_gradient_of_a_block_leaves_the_shares_of_the_next_ones_as_they_were(width, padding):
    """With as many rows as there is room for, and with each smaller number."""
    most = rows_in_gradient(torch.empty(VOCAB + padding, width), VOCAB)
    assert most >= width
    for num_rows in range(1, most + 1):
        buffer = make_buffer(VOCAB + padding, width)
        shares = put_all(buffer, num_rows)
        for columns, share_NC in zip(BLOCKS, shares, strict=True):
            assert torch.equal(buffer.take(columns), share_NC)
            buffer.gradient_of(columns).fill_(-1.0 - columns.start)
        for columns in BLOCKS:
            assert (buffer.result()[columns] == -1.0 - columns.start).all()
        assert not buffer.result()[VOCAB:].any()


def where_the_shares_are(buffer, num_rows):
    """Whether the shares of a whole chunk stand in the memory of the gradient."""
    put_all(buffer, num_rows)
    own = buffer.shares.untyped_storage().data_ptr()
    for columns in BLOCKS:
        buffer.take(columns)
        buffer.gradient_of(columns)
    return buffer.gradient_VD is not None and own == buffer.gradient_VD.untyped_storage().data_ptr()


def test_only_a_first_chunk_that_fits_waits_in_the_gradient():
    assert [where_the_shares_are(make_buffer(), num_rows) for num_rows in (1, 3, 4)] == [True, True, False]
    buffer = make_buffer()
    assert [where_the_shares_are(buffer, 2) for _ in range(3)] == [True, False, False]
    assert not where_the_shares_are(make_buffer(needs_gradient=False), 2)
    assert not where_the_shares_are(make_buffer(in_blocks=False), 2)


def test_revised_shares_are_those_that_are_taken_and_a_chunk_may_end_without_a_gradient():
    buffer = make_buffer()
    shares = put_all(buffer, 2)
    for columns in reversed(BLOCKS):
        buffer.revise(columns).mul_(2.0)
    for columns, share_NC in zip(BLOCKS, shares, strict=True):
        assert torch.equal(buffer.take(columns), 2.0 * share_NC)
        buffer.gradient_of(columns)
    frozen = make_buffer(needs_gradient=False)
    for _ in range(2):
        put_all(frozen, 2)
        frozen.drop()
    assert frozen.result() is None
    with pytest.raises(AssertionError, match="shares are dropped"):
        buffer.drop()


def test_without_a_chunk_the_gradient_is_zero_and_without_need_there_is_none():
    buffer = make_buffer()
    buffer.gradient_VD.fill_(5.0)
    assert not buffer.result().any()
    frozen = make_buffer(needs_gradient=False)
    put_all(frozen, 2)
    for columns in BLOCKS:
        frozen.take(columns)
        assert frozen.gradient_of(columns) is None
    assert frozen.result() is None


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("put", first)], "shares are put for columns 0..4, with .* gradients written up to 10 of 10"),
        ([("begin", 2), ("put", second)], "shares are put for columns 4..8, with shares put up to 0"),
        ([("begin", 2), ("put", first), ("put", first)], "shares are put for columns 0..4"),
        ([("begin", 2), ("put", first), ("take", first)], "shares are taken for columns 0..4"),
        ([("begin", 2), *PUT, ("take", second)], "shares are taken for columns 4..8"),
        ([("begin", 2), *PUT, ("take", first), ("take", second)], "shares are taken for columns 4..8"),
        ([("begin", 2), *PUT, ("take", first), ("gradient_of", first), ("take", first)], "shares are taken"),
        ([("begin", 2), *PUT, ("take", first), ("put", first)], "shares are put for columns 0..4"),
        ([("begin", 2), *PUT, ("gradient_of", first)], "a gradient is written for columns 0..4"),
        ([("begin", 2), *PUT, ("take", first), ("gradient_of", second)], "a gradient is written for columns 4..8"),
        ([("begin", 2), *PUT, ("take", first), ("gradient_of", slice(0, 8))], "a gradient is written for columns 0..8"),
        ([("begin", 2), ("begin", 2)], "a chunk begins, with shares put up to 0"),
        ([("begin", 2), *PUT, ("take", first), ("gradient_of", first), ("begin", 2)], "a chunk begins"),
        ([("begin", 2), *PUT, ("result",)], "the result is taken, with shares put up to 10"),
        ([("begin", 2), ("put", first), ("revise", first)], "shares are revised for columns 0..4"),
        ([("begin", 2), *PUT, ("take", first), ("revise", second)], "shares are revised for columns 4..8"),
    ],
)
def test_a_use_out_of_order_fails_and_says_where_it_stood(steps, message, needs_gradient):
    buffer = make_buffer(needs_gradient=needs_gradient)
    *before, (name, *arguments) = steps
    for earlier, argument in before:
        getattr(buffer, earlier)(argument)
    with pytest.raises(AssertionError, match=f"out of order: {message}"):
        getattr(buffer, name)(*arguments)


@pytest.mark.parametrize("change", ["gradients in the other order", "shares in the other order", "a block left out"])
def test_a_head_that_goes_another_way_through_its_blocks_fails(monkeypatch, change):
    right_blocks, right_gradient = head_chunks._blocks, head_chunks.logit_gradient

    def other_gradient(chunk, events, *gradients):
        chunk = chunk._replace(blocks=chunk.blocks[::-1], scale_NM=chunk.scale_NM.flip(1))
        return right_gradient(chunk, events, *gradients)

    if change == "gradients in the other order":
        monkeypatch.setattr(head_loss, "logit_gradient", other_gradient)
    elif change == "shares in the other order":
        monkeypatch.setattr(head_chunks, "_blocks", lambda *arguments: right_blocks(*arguments)[::-1])
    else:
        monkeypatch.setattr(head_chunks, "_blocks", lambda *arguments: right_blocks(*arguments)[:-1])
    hidden, weight, teacher = make_head()
    support = make_support(7, 4)
    arguments = (hidden, weight, support, dense_buckets(teacher, support)[0], torch.ones(7), reverse_kl)
    with pytest.raises(AssertionError, match="out of order"):
        sparse_head_loss(*arguments, plan=PLANS["cpu"]._replace(block_columns=5))


def test_gradients_that_are_made_ahead_of_their_sums_fail(monkeypatch):
    right = head_gradients.HeadGradients.add
    monkeypatch.setattr(
        head_gradients.HeadGradients, "add", lambda self, rows, blocks, *rest: right(self, rows, list(blocks), *rest)
    )
    hidden, weight, teacher = make_head()
    support = make_support(7, 4)
    arguments = (hidden, weight, support, dense_buckets(teacher, support)[0], torch.ones(7), reverse_kl)
    with pytest.raises(AssertionError, match="out of order: shares are taken for columns 5..10"):
        sparse_head_loss(*arguments, plan=PLANS["cpu"]._replace(block_columns=5))
