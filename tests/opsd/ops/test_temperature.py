"""A token's own temperature on bucket log-probabilities, and the loss of a teacher of which only buckets are known."""
# N rows, V vocabulary, U support size, K the teacher's top tokens

import math

import pytest
import torch

from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import DIVERGENCES, reverse_kl
from opsd.ops.temperature import temper
from tests.opsd.ops.head.reference import dense_buckets, dense_events

NO_TAIL = torch.zeros(2, dtype=torch.float64)


def test_each_row_is_raised_to_its_own_power_and_sums_to_one():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]], dtype=torch.float64)
    tempered = temper(probs.log(), torch.tensor([2.0, 0.5], dtype=torch.float64), NO_TAIL).exp()
    powers = torch.stack([probs[0].sqrt(), probs[1].square()])
    torch.testing.assert_close(tempered, powers / powers.sum(1, keepdim=True))


def test_the_rest_is_a_sum_of_powers():
    tokens = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05], [0.3, 0.1, 0.2, 0.2, 0.2]], dtype=torch.float64)
    powers = tokens ** torch.tensor([[0.5], [2.0]])
    expected = torch.cat([powers[:, :2], powers[:, 2:].sum(1, keepdim=True)], 1)
    shape = tokens[:, 2:] / tokens[:, 2:].sum(1, keepdim=True)
    tail = (shape ** torch.tensor([[0.5], [2.0]])).sum(1).log()
    buckets = torch.cat([tokens[:, :2], tokens[:, 2:].sum(1, keepdim=True)], 1).log()
    tempered = temper(buckets, torch.tensor([2.0, 0.5], dtype=torch.float64), tail)
    torch.testing.assert_close(tempered.exp(), expected / expected.sum(1, keepdim=True))


def test_temperature_one_changes_nothing_and_an_empty_bucket_stays_empty():
    logprobs = torch.tensor([[0.6, 0.0, 0.4], [0.1, 0.9, 0.0]], dtype=torch.float64).log()
    torch.testing.assert_close(temper(logprobs, torch.ones(2), NO_TAIL), logprobs)
    warmer = temper(logprobs, torch.full((2,), 3.0), NO_TAIL + 2.0)
    assert warmer[0, 1] == -math.inf and warmer[1, 2] == -math.inf
    assert warmer[0, 0].exp() < 0.6


@pytest.mark.parametrize("field", ["temperature_N", "rest_tail_N"])
def test_values_of_another_shape_are_refused(field):
    arguments = {"temperature_N": torch.ones(2), "rest_tail_N": torch.zeros(2)} | {field: torch.ones(1)}
    with pytest.raises(ValueError, match=rf"{field} must have shape \(2,\), got \(1,\)"):
        temper(torch.zeros(2, 3), **arguments)


def zipf_rows(num_rows=24, vocab=4000, width=32, seed=0):
    """Hidden rows and a head with logits like a language model's: the mass falls off as a power of the rank.

    Returns hidden [N, D], weight [V, D] and the teacher's logits [N, V]: those of the student, each moved a little.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    weight[:, 0] = -torch.linspace(1.0, vocab, vocab, dtype=torch.float64).log()  # a unigram bias
    hidden = 0.5 * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
    hidden[:, 0] = 0.8 + 0.6 * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    noise = 0.5 * torch.randn(num_rows, vocab, generator=generator, dtype=torch.float64)
    return hidden, weight, hidden @ weight.T + noise


def loss_of(hidden, weight, support, teacher_logprobs, temperature, divergence=reverse_kl, **options):
    """(per row, gradient of the sum to hidden, to weight), each row at `temperature`."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    temperature_N = torch.full((len(hidden),), temperature) if isinstance(temperature, float) else temperature
    arguments = (support, teacher_logprobs, torch.ones(len(hidden)), divergence)
    loss, value_N = sparse_head_loss(*leaves, *arguments, temperature_N=temperature_N, **options)
    return value_N, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 1.25, 1.65, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stop_ids", [(), (7, 2, 300)])
def test_a_student_equal_to_a_teacher_of_whom_only_the_top_is_known_has_no_loss(temperature, dtype, stop_ids):
    """Two stop ids are likely: one event at any temperature. A rest raised to a power as one token gives 0.7 nats."""
    hidden, weight, _ = zipf_rows()
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    logits = hidden.double() @ weight.double().T
    support = dense_events(logits, {"stop_ids": stop_ids}).topk(64, dim=1).indices
    teacher_logprobs, _ = dense_buckets(logits, support, {"stop_ids": stop_ids})
    assert 0.05 < teacher_logprobs[:, -1].exp().mean() < 0.9
    value, *grads = loss_of(hidden, weight, support, teacher_logprobs, temperature, stop_ids=stop_ids)
    limit = 1e-9 if dtype == torch.float64 else 1e-5
    assert value.abs().max() < limit
    scale = (logits.softmax(1) @ weight.double()).norm(), (logits.softmax(1).T @ hidden.double()).norm()
    for grad, size in zip(grads, scale, strict=True):
        assert grad.norm() < limit * size


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_temperature_keeps_the_teacher_as_the_optimum_of_every_divergence(name):
    hidden, weight, _ = zipf_rows()
    logits = hidden @ weight.T
    support = logits.topk(16, dim=1).indices
    teacher_logprobs, _ = dense_buckets(logits, support)
    temperature = torch.linspace(0.5, 2.0, len(hidden))
    value, *grads = loss_of(hidden, weight, support, teacher_logprobs, temperature, DIVERGENCES[name])
    assert value.abs().max() < 1e-9
    assert max(grad.abs().max() for grad in grads) < 1e-7


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("temperature", [0.6, 1.25, 1.65])
def test_the_gradient_is_near_that_of_the_dense_tempered_loss(name, temperature):
    hidden, weight, teacher = zipf_rows()
    support = teacher.topk(64, dim=1).indices
    value, grad_hidden, _ = loss_of(
        hidden, weight, support, dense_buckets(teacher, support)[0], temperature, DIVERGENCES[name]
    )
    leaf = hidden.clone().requires_grad_()
    student_NV = (leaf @ weight.T / temperature).log_softmax(1)
    dense = DIVERGENCES[name](student_NV, (teacher / temperature).log_softmax(1))
    (exact,) = torch.autograd.grad(dense.sum(), leaf)
    cosine = torch.nn.functional.cosine_similarity(grad_hidden.flatten(), exact.flatten(), dim=0)
    assert cosine > 0.97
    assert (value > 0.0).all()


def test_rows_at_temperature_one_are_those_without_a_temperature():
    hidden, weight, teacher = zipf_rows()
    support = teacher.topk(16, dim=1).indices
    teacher_logprobs, _ = dense_buckets(teacher, support)
    temperature = torch.ones(len(hidden))
    temperature[::2] = 1.5
    value, grad_hidden, _ = loss_of(hidden, weight, support, teacher_logprobs, temperature)
    plain, plain_hidden, _ = loss_of(hidden, weight, support, teacher_logprobs, None)
    torch.testing.assert_close(value[1::2], plain[1::2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad_hidden[1::2], plain_hidden[1::2], rtol=1e-10, atol=1e-12)
    assert (value[::2] - plain[::2]).abs().min() > 1e-4


@pytest.mark.parametrize("num_named", [15, 16])
def test_a_rest_of_one_token_or_none_leaves_the_dense_loss(num_named):
    hidden, weight, teacher = zipf_rows(vocab=16)
    support = teacher.topk(num_named, dim=1).indices
    temperature = torch.linspace(0.5, 2.0, len(hidden), dtype=torch.float64)
    value, grad_hidden, _ = loss_of(hidden, weight, support, dense_buckets(teacher, support)[0], temperature)
    leaf = hidden.clone().requires_grad_()
    student_NV, teacher_NV = ((z / temperature[:, None]).log_softmax(1) for z in (leaf @ weight.T, teacher))
    dense = reverse_kl(student_NV, teacher_NV)
    torch.testing.assert_close(value, dense.detach())
    torch.testing.assert_close(grad_hidden, torch.autograd.grad(dense.sum(), leaf)[0])
