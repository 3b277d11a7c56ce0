"""What the columns of the head stand for: stop ids, padding, foreign ids, empty slots, and supports that do not fit."""
# N rows, D width, V vocabulary, U support size, B = U + 1 buckets

import pytest
import torch

from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import DIVERGENCES, reverse_kl
from tests.opsd.ops.head.reference import dense_buckets, gradients, make_head, make_support


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_student_and_a_teacher_that_stop_with_different_ids_agree(name):
    hidden, weight, _ = make_head()
    with torch.no_grad():
        weight[12], hidden[:, 0] = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0]), 2.0
    teacher = (hidden @ weight.T).detach()
    teacher[:, [3, 12]] = teacher[:, [12, 3]]
    losses = {}
    for stop_ids in ((), (3, 12)):
        support = torch.tensor([[3, 5, 7]]).expand(7, 3)
        teacher_logprobs, _ = dense_buckets(teacher, support, {"stop_ids": stop_ids})
        arguments = (support, teacher_logprobs, torch.ones(7), DIVERGENCES[name])
        losses[stop_ids], _ = sparse_head_loss(hidden, weight, *arguments, stop_ids=stop_ids)
    assert losses[()] > 0.1
    assert losses[(3, 12)].abs() < 1e-5


def test_empty_slots_change_nothing():
    hidden, weight, teacher = make_head(dtype=torch.float64)
    support = torch.stack([torch.randperm(15)[:4] + 1 for _ in range(7)])
    support[:3, 1] = 0  # token 0 named, or not: an empty slot must not touch it either way
    padded = torch.cat([support[:, :2], torch.full((7, 3), -1), support[:, 2:]], dim=1)
    results = []
    for ids in (support, padded):
        teacher_logprobs, _ = dense_buckets(teacher, ids)
        loss, per_token = sparse_head_loss(hidden, weight, ids, teacher_logprobs, torch.ones(7), reverse_kl)
        results.append([per_token, *gradients(loss, hidden, weight)])
    torch.testing.assert_close(results[1], results[0])


def test_a_padded_vocabulary_equals_the_head_without_the_padding():
    hidden, weight, teacher = make_head(dtype=torch.float64)
    support = make_support(7, 4, {"vocab_size": 13})
    teacher_logprobs, _ = dense_buckets(teacher[:, :13], support)
    arguments = (support, teacher_logprobs, torch.ones(7), reverse_kl)
    padded, _ = sparse_head_loss(hidden, weight, *arguments, vocab_size=13)
    cut, _ = sparse_head_loss(hidden, weight[:13], *arguments)
    torch.testing.assert_close(padded, cut)
    torch.testing.assert_close(gradients(padded, hidden, weight), gradients(cut, hidden, weight))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("foreign", [(5,), (0, 7, 15), tuple(range(8, 16))])
def test_foreign_ids_equal_the_head_without_their_rows(foreign, plan):
    """Values, entropy and gradients; the last case is one half of the vocabulary."""
    hidden, weight, teacher = make_head(dtype=torch.float64)
    kept = torch.tensor([v for v in range(16) if v not in foreign])
    place = torch.tensor([1, 3, 4])  # of the support, among the kept
    without = weight.detach()[kept].requires_grad_()
    rows = len(hidden)
    teacher_logprobs = dense_buckets(teacher[:, kept], place.expand(rows, 3))[0].float()
    found, expected = [], []
    for out, head, ids, options in (
        (found, weight, kept[place], {"foreign_ids": foreign, "plan": plan}),
        (expected, without, place, {}),
    ):
        support = ids.expand(rows, 3)
        out.extend(bucket_logprobs(hidden, head, support, **options))
        loss, _ = sparse_head_loss(
            hidden, head, support, teacher_logprobs, torch.ones(rows), reverse_kl, filter_threshold=0.0, **options
        )
        out.extend([loss, *gradients(loss, hidden, head)])
    assert found[-1][list(foreign)].abs().max() == 0
    found[-1] = found[-1][kept]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("weight_VD", torch.zeros(16, 4)),
        ("support_NU", torch.zeros(6, 3, dtype=torch.int64)),
        ("teacher_logprobs_NB", torch.zeros(7, 3)),
        ("weight_N", torch.ones(6)),
        ("temperature_N", torch.ones(6)),
        ("vocab_size", 17),
        ("stop_ids", (3, 16)),
        ("stop_ids", (3, 3)),
        ("chunk_rows", 0),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(field, changed):
    arguments = {
        "hidden_ND": torch.zeros(7, 5),
        "weight_VD": torch.zeros(16, 5),
        "support_NU": torch.arange(3).expand(7, 3),
        "teacher_logprobs_NB": torch.zeros(7, 4),
        "weight_N": torch.ones(7),
        "divergence": reverse_kl,
    }
    with pytest.raises(ValueError, match=field):
        sparse_head_loss(**arguments | {field: changed})


@pytest.mark.parametrize(
    ("row", "stop_ids", "message"),
    [
        ([4, 7, 4], (), "support_NU must name a token once per row, got 4 twice in row 2"),
        ([-1, 0, 0], (), "support_NU must name a token once per row, got 0 twice in row 2"),
        ([3, 9, 3], (3, 9), "support_NU must name a token once per row, got 3 twice in row 2"),
        ([3, 5, 9], (3, 9), "support_NU must name the stop event by its first id, 3, got 9 in row 2"),
        ([5, 9, 4], (12, 3, 9), "support_NU must name the stop event by its first id, 12, got 9 in row 2"),
        ([5, -2, 4], (), "support_NU must hold ids below 16, or -1 for an empty slot, got -2"),
        ([5, 16, 4], (), "support_NU must hold ids below 16, or -1 for an empty slot, got 16"),
    ],
)
def test_a_support_that_would_count_a_mass_twice_is_refused_with_its_row(row, stop_ids, message):
    hidden, weight, _ = make_head()
    support = torch.tensor([4, 5, -1]).repeat(7, 1)
    support[2] = torch.tensor(row)
    with pytest.raises(ValueError, match=message):
        bucket_logprobs(hidden, weight, support, stop_ids=stop_ids)
    arguments = (support, torch.zeros(7, 4), torch.ones(7), reverse_kl)
    with pytest.raises(ValueError, match=message):
        sparse_head_loss(hidden, weight, *arguments, stop_ids=stop_ids)


def test_empty_slots_and_the_name_of_the_stop_event_are_no_mistakes():
    hidden, weight, _ = make_head()
    support = torch.tensor([-1, 9, -1]).repeat(7, 1)
    logprobs, _ = bucket_logprobs(hidden, weight, support, stop_ids=(9, 3))
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(7))
