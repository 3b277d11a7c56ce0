"""The rows in chunks: how they are divided, that it changes nothing, and what a chunk allocates."""
# N rows, D width, V vocabulary, U support size

import math

import pytest
import torch

from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import reverse_kl
from tests.opsd.ops.head.largest_tensor import LargestTensor
from tests.opsd.ops.head.reference import D, V, dense_buckets, gradients, make_head, make_support


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
def test_the_size_of_a_chunk_changes_nothing(chunk_rows):
    hidden, weight, teacher = make_head(dtype=torch.float64)
    support = make_support(7, 4)
    teacher_logprobs, _ = dense_buckets(teacher, support)
    arguments = (hidden, weight, support, teacher_logprobs, torch.rand(7, dtype=torch.float64), reverse_kl)
    whole, chunked = sparse_head_loss(*arguments, chunk_rows=7), sparse_head_loss(*arguments, chunk_rows=chunk_rows)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(gradients(chunked[0], hidden, weight), gradients(whole[0], hidden, weight))


@pytest.mark.parametrize(
    ("frozen", "num_rows", "expected"),
    [
        (True, 0, []),
        (True, 5, [5]),
        (True, 10, [10]),
        (True, 11, [5, 6]),
        (True, 41, [5, 9, 9, 9, 9]),
        (False, 0, []),
        (False, 18, [18]),  # the gradient has room for 18, chunk_bytes for blocks of 21
        (False, 19, [12, 7]),
        (False, 41, [14, 9, 9, 9]),
    ],
)
def test_rows_are_divided_evenly_within_the_memory_budget(monkeypatch, frozen, num_rows, expected):
    small = PLANS["cpu"]._replace(block_columns=10, chunk_bytes=10 * 4 * V + 3)
    monkeypatch.setitem(PLANS, "cpu", small)
    seen = []

    def divergence(student, teacher):
        seen.append(len(student))
        return reverse_kl(student, teacher)

    support, weight_N = torch.zeros(num_rows, 1, dtype=torch.int64), torch.ones(num_rows)
    teacher_logprobs = torch.full((num_rows, 2), math.log(0.5))
    hidden, weight = torch.zeros(num_rows, 3 * D), torch.zeros(V, 3 * D, requires_grad=not frozen)
    sparse_head_loss(hidden, weight, support, teacher_logprobs, weight_N, divergence)
    assert seen == expected


def test_no_tensor_of_rows_times_vocabulary_exists():
    hidden, weight, teacher = make_head(num_rows=100, vocab=200, width=4)
    support = make_support(100, 4, {"vocab_size": 200})
    teacher_logprobs = dense_buckets(teacher, support)[0].float()
    with LargestTensor() as largest:
        arguments = (support, teacher_logprobs, torch.ones(100), reverse_kl)
        sparse_head_loss(hidden, weight, *arguments, chunk_rows=5)[0].backward()
        logprobs, entropy = bucket_logprobs(hidden, weight, support, chunk_rows=5)
        (reverse_kl(logprobs, teacher_logprobs) + entropy).sum().backward()
    assert largest.numel == 5 * 200


@pytest.mark.parametrize(
    ("trained", "num_rows", "vocab", "expected"),
    [("hidden", 20, 100, 20 * 50), ("weight", 100, 20, 20 * 50), ("neither", 50, 50, 5 * 50)],
)
def test_only_gradients_that_are_needed_are_formed(trained, num_rows, vocab, expected):
    hidden, weight, teacher = make_head(num_rows, vocab, width=50)
    support = make_support(num_rows, 4)
    teacher_logprobs = dense_buckets(teacher, support)[0].float()
    hidden.requires_grad_(trained == "hidden")
    weight.requires_grad_(trained == "weight")
    with LargestTensor() as largest:
        arguments = (support, teacher_logprobs, torch.ones(num_rows), reverse_kl)
        loss, _ = sparse_head_loss(hidden, weight, *arguments, chunk_rows=5)
    assert loss.requires_grad == (trained != "neither")
    assert largest.numel == expected
