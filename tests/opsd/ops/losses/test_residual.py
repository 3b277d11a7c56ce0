"""The residual reverse KL: over every token that may be drawn, its gradient is the dense one, through the real head."""
# V vocabulary, D width, U support size

import math

import pytest
import torch

from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import reverse_kl
from opsd.ops.losses.residual import residual_reverse_kl
from tests.opsd.ops.head.reference import dense_events

VOCAB, WIDTH, TOP_K, NUM_CANDIDATES = 7, 3, 2, 2
STOPS = (5, 2)
EVERY_SUPPORT = pytest.mark.parametrize("support", ["teacher", "union", "everything"])
EVERY_VOCABULARY = pytest.mark.parametrize("options", [{}, {"stop_ids": STOPS}], ids=["plain", "stops"])
CONTEXTS = pytest.mark.parametrize("seed", range(4))


def make_context(seed, options):
    """One hidden row [D], a head [V, D], and the teacher's probabilities of the events [V]."""
    generator = torch.Generator().manual_seed(seed)
    hidden_D, weight_VD = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((WIDTH,), (VOCAB, WIDTH))
    )
    teacher_1V = 2.0 * torch.randn(1, VOCAB, generator=generator, dtype=torch.float64)
    return hidden_D, weight_VD, dense_events(teacher_1V, options)[0]


def student_of(hidden_D, weight_VD, options):
    return dense_events((hidden_D @ weight_VD.T)[None], options)[0]


def likeliest(probs_V, number):
    return set(probs_V.topk(number).indices.tolist())


def support_of(support, student_V, teacher_V):
    """S, made without a look at the sampled token."""
    if support == "everything":
        return {event for event in range(VOCAB) if student_V[event] > 0}
    own = likeliest(student_V, NUM_CANDIDATES) if support == "union" else set()
    return likeliest(teacher_V, TOP_K) | own


def rows_of(named, student_V, teacher_V):
    """A row for each event that may be drawn, that event first: weights, ids, the teacher's buckets, row inputs."""
    events = [event for event in range(VOCAB) if student_V[event] > 0]
    ids, buckets, outside, tails = [], [], [], []
    for event in events:
        others = sorted(named - {event})
        slots = [event, *others, *[-1] * (len(named) - len(others))]
        known = torch.stack([teacher_V[i] if i >= 0 else teacher_V.new_zeros(()) for i in slots])
        unnamed = sum((teacher_V[i] for i in range(VOCAB) if i not in slots), teacher_V.new_zeros(()))
        ids.append(slots)
        buckets.append(torch.cat([known, unnamed[None]]).log())
        outside.append(event not in named)
        tails.append(sum((teacher_V[i] for i in range(VOCAB) if i not in named), teacher_V.new_zeros(())).log())
    inputs = {"outside_N": torch.tensor(outside), "teacher_tail_N": torch.stack(tails)}
    return student_V[events].detach(), torch.tensor(ids), torch.stack(buckets), inputs


def sparse_loss(divergence, hidden_D, weight_VD, rows, options, **inputs):
    draw_N, ids, buckets, _ = rows
    hidden_ND = hidden_D.expand(len(draw_N), -1)
    return sparse_head_loss(
        hidden_ND, weight_VD, ids, buckets, draw_N, divergence, row_inputs=inputs, chunk_rows=3, **options
    )


def gradients(loss, hidden_D, weight_VD):
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, (hidden_D, weight_VD))])


def dense_gradients(hidden_D, weight_VD, teacher_V, options):
    student_V = student_of(hidden_D, weight_VD, options)
    possible = student_V.detach() > 0
    value = (student_V[possible] * (student_V[possible] / teacher_V[possible]).log()).sum()
    return value.detach(), gradients(value, hidden_D, weight_VD)


def everything(seed, support, options):
    hidden_D, weight_VD, teacher_V = make_context(seed, options)
    student_V = student_of(hidden_D, weight_VD, options).detach()
    named = support_of(support, student_V, teacher_V)
    return hidden_D, weight_VD, teacher_V, student_V, named, rows_of(named, student_V, teacher_V)


@EVERY_SUPPORT
@EVERY_VOCABULARY
@CONTEXTS
def test_over_all_draws_the_gradient_is_the_dense_one(support, options, seed):
    hidden_D, weight_VD, teacher_V, _, _, rows = everything(seed, support, options)
    loss, _ = sparse_loss(residual_reverse_kl, hidden_D, weight_VD, rows, options, **rows[3])
    _, dense = dense_gradients(hidden_D, weight_VD, teacher_V, options)
    torch.testing.assert_close(gradients(loss, hidden_D, weight_VD), dense, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("support", ["teacher", "union"])
@EVERY_VOCABULARY
@CONTEXTS
def test_without_the_residual_it_is_another(support, options, seed):
    hidden_D, weight_VD, teacher_V, _, _, rows = everything(seed, support, options)
    _, dense = dense_gradients(hidden_D, weight_VD, teacher_V, options)
    loss, _ = sparse_loss(reverse_kl, hidden_D, weight_VD, rows, options)
    assert (gradients(loss, hidden_D, weight_VD) - dense).norm() > 1e-3 * dense.norm()


@EVERY_SUPPORT
@EVERY_VOCABULARY
@CONTEXTS
def test_the_value_is_that_of_the_support_and_its_tail_whatever_was_drawn(support, options, seed):
    hidden_D, weight_VD, teacher_V, student_V, named, rows = everything(seed, support, options)
    _, value_N = sparse_loss(residual_reverse_kl, hidden_D, weight_VD, rows, options, **rows[3])
    members = sorted(named)
    coarse = (student_V[members] * (student_V[members] / teacher_V[members]).log()).sum()
    tails = [1.0 - own[members].sum() for own in (student_V, teacher_V)]
    if support != "everything":
        coarse = coarse + tails[0] * (tails[0] / tails[1]).log()
    torch.testing.assert_close(value_N, coarse.expand(len(value_N)), rtol=0.0, atol=1e-12)
    dense, _ = dense_gradients(hidden_D, weight_VD, teacher_V, options)
    assert value_N[0] <= dense + 1e-12


def test_a_row_that_names_every_token_is_the_dense_divergence():
    student, teacher = (torch.randn(4, 6, dtype=torch.float64).log_softmax(1) for _ in range(2))
    nothing = torch.full((4, 1), -math.inf, dtype=torch.float64)
    student_NB = torch.cat([student, nothing], dim=1).requires_grad_()
    teacher_NB = torch.cat([teacher, nothing], dim=1)
    inputs = {"outside_N": torch.zeros(4, dtype=torch.bool), "teacher_tail_N": nothing[:, 0]}
    value_N = residual_reverse_kl(student_NB, teacher_NB, **inputs)
    assert torch.equal(value_N, reverse_kl(student_NB, teacher_NB))
    both = [
        torch.autograd.grad(v.sum(), student_NB, retain_graph=True)[0]
        for v in (value_N, reverse_kl(student_NB, teacher_NB))
    ]
    assert torch.equal(*both)


def test_a_tail_of_the_sampled_token_alone_has_no_noise():
    """S names all others: whatever is drawn, the gradient is the dense one."""
    hidden_D, weight_VD, teacher_V = make_context(0, {})
    student_V = student_of(hidden_D, weight_VD, {}).detach()
    _, dense = dense_gradients(hidden_D, weight_VD, teacher_V, {})
    _, ids, buckets, inputs = rows_of(set(range(VOCAB - 1)), student_V, teacher_V)
    for row in range(VOCAB):
        alone = (torch.ones(1, dtype=torch.float64), ids[row : row + 1], buckets[row : row + 1], None)
        own = {name: values[row : row + 1] for name, values in inputs.items()}
        loss, _ = sparse_loss(residual_reverse_kl, hidden_D, weight_VD, alone, {}, **own)
        torch.testing.assert_close(gradients(loss, hidden_D, weight_VD), dense, rtol=0.0, atol=1e-10)


def test_inputs_of_another_shape_are_refused():
    rows = torch.zeros(4, 3)
    inputs = {"outside_N": torch.zeros(4, dtype=torch.bool), "teacher_tail_N": torch.zeros(4)}
    for name in inputs:
        with pytest.raises(ValueError, match=rf"{name} must have shape \(4,\), got \(1,\)"):
            residual_reverse_kl(rows, rows, **{**inputs, name: inputs[name][:1]})
    with pytest.raises(ValueError, match="same buckets"):
        residual_reverse_kl(rows, rows[:, 1:], **inputs)
