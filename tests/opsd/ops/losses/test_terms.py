"""Terms beside a divergence, against formulas written with loops."""

import itertools

import numpy as np
import pytest
import torch

from opsd.ops.losses.table import LOSSES
from opsd.ops.losses.terms import dac_kl, kendall, pearson, sinkhorn


def make_rows(seed, rows=6, buckets=6, empty=1):
    """Log-probabilities float64 [rows, buckets]; the last named slots of every second row are empty."""
    logits = 2 * torch.randn(rows, buckets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[::2, buckets - 1 - empty : buckets - 1] = -torch.inf
    return logits.log_softmax(1)


def named(logprobs):
    return [row[:-1][~row[:-1].isneginf()] for row in logprobs]


def test_kendall_comes_to_the_rank_correlation_as_it_sharpens():
    student, teacher = make_rows(0), make_rows(1)
    found = kendall(student, teacher, sharpness=1e6)
    for value, p, q in zip(found, named(student), named(teacher), strict=True):
        pairs = list(itertools.combinations(range(len(p)), 2))
        concordant = sum(1 if (p[i] > p[j]) == (q[i] > q[j]) else -1 for i, j in pairs)
        assert value.item() == pytest.approx(1 - concordant / len(pairs), abs=1e-9)


def test_kendalls_signs_are_soft_on_both_sides():
    student, teacher = make_rows(0), make_rows(1)
    found = kendall(student, teacher, sharpness=0.7)
    for value, p, q in zip(found, named(student), named(teacher), strict=True):
        pairs = list(itertools.combinations(range(len(p)), 2))
        soft = [torch.tanh(0.7 * (p[i] - p[j])) * torch.tanh(0.7 * (q[i] - q[j])) for i, j in pairs]
        assert value.item() == pytest.approx(1 - sum(soft).item() / len(pairs))
    unsure = torch.zeros(1, 4, dtype=torch.float64).log_softmax(1)  # tells no pair apart, so asks for nothing
    rows = make_rows(0)[1:2, -4:].log_softmax(1).requires_grad_()
    (grad,) = torch.autograd.grad(kendall(rows, unsure).sum(), rows)
    assert grad.abs().max() == 0


@pytest.mark.parametrize("log_mass", [0.0, -14.0, -700.0])
def test_pearson_does_not_see_how_much_mass_the_named_tokens_have(log_mass):
    """Against numpy on probabilities that are not scaled; the same at a named mass of 1e-6, and of 1e-304."""
    student, teacher = make_rows(2, empty=0), make_rows(3, empty=0)
    expected = [1 - np.corrcoef(p.exp(), q.exp())[0, 1] for p, q in zip(named(student), named(teacher), strict=True)]
    small = student.clone()
    small[:, :-1] += log_mass
    np.testing.assert_allclose(pearson(small, teacher).numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(pearson(student, teacher + log_mass).numpy(), expected, atol=1e-12)
    assert pearson(small, student).abs().max() < 1e-12  # one is the other, scaled

    def slope(rows):
        rows = rows.clone().requires_grad_()
        return torch.autograd.grad(pearson(rows, teacher).sum(), rows)[0]

    torch.testing.assert_close(slope(small), slope(student))


def test_pearson_of_a_constant_side_is_one_with_a_finite_gradient():
    flat = torch.zeros(3, 5, dtype=torch.float64).log_softmax(1)
    rows = make_rows(2, 3, 5, empty=0)
    lonely = torch.cat([rows[:, :1], torch.full((3, 3), -torch.inf), rows[:, -1:]], dim=1)
    for student, teacher in ((flat, rows), (rows, flat), (lonely, lonely)):
        student = student.clone().requires_grad_()
        value = pearson(student, teacher)
        assert value.tolist() == [1.0] * 3
        assert torch.autograd.grad(value.sum(), student)[0].abs().max() < 1.0


@pytest.mark.parametrize("name", ["kendall", "pearson", "dac_kl"])
def test_gradients_are_those_of_finite_differences(name):
    student, teacher = make_rows(2, empty=0), make_rows(3, empty=0)
    torch.autograd.gradcheck(lambda logits: LOSSES[name](logits.log_softmax(1), teacher), student.requires_grad_())


@pytest.mark.parametrize("name", ["kendall", "pearson", "dac_kl"])
def test_empty_slots_change_nothing(name):
    student, teacher = make_rows(4, empty=2), make_rows(5, empty=2)
    wide = LOSSES[name](student, teacher)[0]
    own = [torch.cat([rows[0, :3], rows[0, -1:]])[None] for rows in (student, teacher)]
    assert wide.item() == pytest.approx(LOSSES[name](*own).item(), abs=1e-12)


def test_a_model_that_equals_its_teacher_pays_nothing_but_a_soft_rank():
    rows = make_rows(6)
    assert pearson(rows, rows).abs().max() < 1e-6 and dac_kl(rows, rows).abs().max() < 1e-12
    assert kendall(rows, rows, sharpness=1e6).abs().max() < 1e-9


def test_dac_kl_is_a_forward_kl_among_the_likelier_half():
    student, teacher = make_rows(7, empty=0), make_rows(8, empty=0)
    found = dac_kl(student, teacher, low=0.5, high=1.0)
    for value, p, q in zip(found, named(student), named(teacher), strict=True):
        inside = q.exp() >= q.exp().quantile(0.5)
        p, q = p[inside].log_softmax(0), q[inside].log_softmax(0)
        assert value.item() == pytest.approx((q.exp() * (q - p)).sum().item())


def plan_by_hand(cost, temperature, iterations):
    plan = (-cost / temperature).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return plan


def test_sinkhorn_against_loops_over_tokens():
    rows, vocab = 5, 9
    generator = torch.Generator().manual_seed(0)
    student, teacher = make_rows(9, rows, 4, empty=0), make_rows(10, rows, 4, empty=0)
    support = torch.stack([torch.randperm(vocab, generator=generator)[:3] for _ in range(rows)])
    soft_student, soft_teacher = ((logprobs / 2).softmax(1) for logprobs in (student, teacher))
    cost = torch.zeros(rows, rows, dtype=torch.float64)
    for i, j in itertools.product(range(rows), repeat=2):
        p = dict(zip(support[i].tolist(), soft_student[i, :-1].tolist(), strict=True))
        q = dict(zip(support[j].tolist(), soft_teacher[j, :-1].tolist(), strict=True))
        both = p.keys() & q.keys()
        cost[i, j] = sum(abs(p[v] - q[v]) for v in both) + abs(sum(p[v] for v in both) - sum(q[v] for v in both))
    expected = rows * (plan_by_hand(cost, 0.1, 20) * cost).sum(1)
    torch.testing.assert_close(sinkhorn(student, teacher, support_NU=support), expected)
    apart = [sinkhorn(student[part], teacher[part], support_NU=support[part]) for part in (slice(3), slice(3, 5))]
    torch.testing.assert_close(sinkhorn(student, teacher, support_NU=support, group_rows=3), torch.cat(apart))


def test_sinkhorn_is_its_authors_loss_where_every_token_is_named():
    """Their forward: softmax of the logits over 2, cdist, Sinkhorn's iterations and the sum; value and gradient."""
    generator = torch.Generator().manual_seed(4)
    logits, teacher = 2 * torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    cost = torch.cdist((logits / 2).softmax(1), (teacher / 2).softmax(1), p=1)
    theirs = (plan_by_hand(cost, 0.1, 20) * cost).sum()
    no_rest = torch.full((6, 1), -torch.inf, dtype=torch.float64)
    buckets = [torch.cat([rows.log_softmax(1), no_rest], dim=1) for rows in (logits, teacher)]
    ours = sinkhorn(*buckets, support_NU=torch.arange(8).expand(6, 8)).mean()  # the learner's mean over tokens
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(found, expected)
    at_a_constant_plan = (plan_by_hand(cost, 0.1, 20).detach() * cost).sum()
    (other,) = torch.autograd.grad(at_a_constant_plan, logits)
    assert torch.cosine_similarity(other.flatten(), expected.flatten(), dim=0) < 0.999


def test_sinkhorns_options_are_checked():
    rows = make_rows(9, 5, 4, empty=0)
    for option in ("group_rows", "logit_temperature", "epsilon"):
        with pytest.raises(ValueError, match=f"{option} must be > 0, got 0"):
            sinkhorn(rows, rows, support_NU=torch.arange(3).expand(5, 3), **{option: 0})


def test_kendalls_sharpness_is_checked():
    for sharpness in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"sharpness must be > 0, got {sharpness}"):
            kendall(make_rows(0), make_rows(1), sharpness=sharpness)


def test_dac_kl_refuses_quantiles_in_the_wrong_order():
    with pytest.raises(ValueError, match="got 0.7 and 0.3"):
        dac_kl(make_rows(0), make_rows(1), low=0.7, high=0.3)
