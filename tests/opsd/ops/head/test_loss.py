"""The chunked head against dense float64 computations: values, gradients, memory."""
# N rows, D width, V vocabulary, U support size, B = U + 1 buckets

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import DIVERGENCES, reverse_kl
from tests.oracle import dense_divergence

EVERY_DIVERGENCE = pytest.mark.parametrize("name", sorted(DIVERGENCES))
DETACHED = {"todi", "akl"}  # their gradient is not the derivative of their value
NO_BOUND = {"akl", "abkd"}  # the coarse value may exceed the dense one
EVERY_HEAD = pytest.mark.parametrize(
    "head",
    [
        {},
        {"temperature": True},
        {"vocab_size": 13},
        {"stop_ids": (2, 9, 11)},
        {"temperature": True, "vocab_size": 13, "stop_ids": (9, 2)},
    ],
    ids=lambda head: "+".join(head) or "plain",
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_head(num_rows=7, vocab=16, width=5, dtype=torch.float32, seed=0):
    """hidden [N, D], weight [V, D] that require gradients, and teacher logits [N, V]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    teacher = 2.0 * torch.randn(num_rows, vocab, generator=generator, dtype=torch.float64)
    return hidden, weight, teacher


def head_options(head, num_rows):
    options = dict(head)
    if options.pop("temperature", False):
        options["temperature_N"] = torch.linspace(0.5, 2.0, num_rows)
    return options


def make_support(num_rows, num_slots, options=None):
    """Distinct ids a row, of the stop ids only the first; the last slot of every second row is empty."""
    options = options or {}
    generator = torch.Generator().manual_seed(1)
    merged_away = options.get("stop_ids", ())[1:]
    allowed = torch.tensor([v for v in range(options.get("vocab_size", 16)) if v not in merged_away])
    order = [torch.randperm(len(allowed), generator=generator)[:num_slots] for _ in range(num_rows)]
    support = allowed[torch.stack(order)]
    support[::2, -1] = -1
    return support


def dense_events(logits, options):
    """Probabilities of events in float64: the stop ids merged, then each row at its temperature."""
    logits = logits.double()[:, : options.get("vocab_size")]
    if options.get("stop_ids"):
        first, *others = options["stop_ids"]
        merged = logits[:, list(options["stop_ids"])].logsumexp(1, keepdim=True)
        token = torch.arange(logits.shape[1])
        logits = torch.where(token == first, merged, logits)
        logits = logits.masked_fill(torch.isin(token, torch.tensor(others)), -math.inf)
    if "temperature_N" in options:
        logits = logits / options["temperature_N"].double()[:, None]
    return logits.softmax(1)


def outside_of(support, num_columns):
    """1.0 for each token that the row does not name, else 0.0."""
    outside = torch.ones(len(support), num_columns, dtype=torch.float64)
    for row, ids in zip(outside, support.tolist(), strict=True):
        row[[v for v in ids if v >= 0]] = 0.0
    return outside


def dense_buckets(logits, support, options=None):
    """Bucket log-probabilities and entropy in float64 by plain sums of probabilities, differentiable by autograd."""
    probs = dense_events(logits, options or {})
    outside = outside_of(support, probs.shape[1])
    named = probs.gather(1, support.clamp_min(0)).log().masked_fill(support < 0, -math.inf)
    rest = (probs * outside).sum(1, keepdim=True).log()
    entropy = -torch.xlogy(probs, probs.clamp_min(1e-300)).sum(1)
    return torch.cat([named, rest], dim=1), entropy


def known_of(teacher_logits, support, options):
    """What a scoring service says of the teacher: buckets at temperature 1."""
    return dense_buckets(teacher_logits, support, {k: v for k, v in options.items() if k != "temperature_N"})[0]


def tempered_teacher(teacher_logprobs, student_logits, support, options):
    """The buckets of a teacher whose rest has the student's shape, at each row's temperature; by plain powers."""
    if "temperature_N" not in options:
        return teacher_logprobs
    power = 1.0 / options["temperature_N"].double()[:, None]
    at_one = {k: v for k, v in options.items() if k != "temperature_N"}
    rest = dense_events(student_logits.detach(), at_one)
    rest = rest * outside_of(support, rest.shape[1])
    shape = rest / rest.sum(1, keepdim=True)
    teacher = teacher_logprobs.double().exp()
    powers = torch.cat([teacher[:, :-1] ** power, ((teacher[:, -1:] * shape) ** power).sum(1, keepdim=True)], dim=1)
    return (powers / powers.sum(1, keepdim=True)).log()


def gradients(value, *inputs):
    return [grad.double() for grad in torch.autograd.grad(value, inputs, retain_graph=True)]


def assert_near(actual, expected, relative):
    """Relative to the largest entry: the small entries of a gradient carry the rounding of the large ones."""
    assert (actual.double() - expected).abs().max() <= relative * expected.abs().max()


@EVERY_DIVERGENCE
@pytest.mark.parametrize("fused", [True, False])
def test_naming_every_token_equals_the_dense_divergence(name, fused):
    hidden, weight, teacher = make_head()
    support = torch.stack([torch.randperm(16) for _ in range(7)])
    teacher_logprobs = teacher.log_softmax(1).gather(1, support).float()
    teacher_logprobs = torch.cat([teacher_logprobs, torch.full((7, 1), -math.inf)], dim=1)
    token_weight = torch.rand(7)
    if fused:
        loss, per_token = sparse_head_loss(
            hidden, weight, support, teacher_logprobs, token_weight, DIVERGENCES[name], chunk_rows=3
        )
    else:
        logprobs, _ = bucket_logprobs(hidden, weight, support, chunk_rows=3)
        per_token = DIVERGENCES[name](logprobs, teacher_logprobs)
        loss = (token_weight * per_token).sum()
    expected = dense_divergence(name, hidden.double() @ weight.double().T, teacher)
    assert_near(per_token, expected, 1e-5)
    expected_grads = gradients((token_weight * expected).sum(), hidden, weight)
    for actual, wanted in zip(gradients(loss, hidden, weight), expected_grads, strict=True):
        assert_near(actual, wanted, 1e-5)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - NO_BOUND))
def test_a_strict_support_bounds_the_dense_divergence_from_below(name):
    hidden, weight, teacher = make_head()
    support = make_support(7, 4)
    teacher_logprobs, _ = dense_buckets(teacher, support)
    _, per_token = sparse_head_loss(hidden, weight, support, teacher_logprobs, torch.ones(7), DIVERGENCES[name])
    dense = dense_divergence(name, hidden.double() @ weight.double().T, teacher)
    assert (per_token > 0.0).all()
    assert (per_token < dense).all()


@EVERY_DIVERGENCE
@EVERY_HEAD
def test_the_fused_loss_has_value_and_gradient_of_the_coarse_divergence(name, head):
    hidden, weight, teacher = make_head()
    options = head_options(head, 7)
    support = make_support(7, 4, options)
    teacher_logprobs = known_of(teacher, support, options)
    token_weight = torch.rand(7)
    loss, per_token = sparse_head_loss(
        hidden, weight, support, teacher_logprobs, token_weight, DIVERGENCES[name], chunk_rows=2, **options
    )
    logits = hidden.double() @ weight.double().T
    student_logprobs, _ = dense_buckets(logits, support, options)
    coarse = DIVERGENCES[name](student_logprobs, tempered_teacher(teacher_logprobs, logits, support, options))
    assert_near(per_token, coarse, 1e-5)
    expected_grads = gradients((token_weight * coarse).sum(), hidden, weight)
    for actual, wanted in zip(gradients(loss, hidden, weight), expected_grads, strict=True):
        assert_near(actual, wanted, 1e-5)


@EVERY_HEAD
@pytest.mark.parametrize("entropy_share", [0.0, 1.0])
def test_buckets_and_entropy_equal_a_dense_computation(head, entropy_share):
    hidden, weight, _ = make_head()
    options = head_options(head, 7)
    support = make_support(7, 4, options)
    logprobs, entropy = bucket_logprobs(hidden, weight, support, chunk_rows=2, **options)
    dense_logprobs, dense_entropy = dense_buckets(hidden.double() @ weight.double().T, support, options)
    torch.testing.assert_close(logprobs.double(), dense_logprobs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), dense_entropy, rtol=1e-5, atol=1e-6)
    upstream = (torch.rand(logprobs.shape), torch.full((7,), entropy_share))  # of empty slots too: it must not matter
    actual = torch.autograd.grad((logprobs, entropy), (hidden, weight), upstream)
    upstream_64 = tuple(grad.double() for grad in upstream)
    expected = torch.autograd.grad((dense_logprobs, dense_entropy), (hidden, weight), upstream_64)
    for left, right in zip(actual, expected, strict=True):
        assert_near(left, right.double(), 1e-5)


@EVERY_HEAD
def test_gradcheck_of_buckets_and_entropy(head):
    hidden, weight, _ = make_head(num_rows=3, dtype=torch.float64)
    options = head_options(head, 3)
    support = make_support(3, 4, options)
    possible = torch.cat([support >= 0, torch.ones(3, 1, dtype=torch.bool)], dim=1)

    def finite_outputs(hidden, weight):
        logprobs, entropy = bucket_logprobs(hidden, weight, support, chunk_rows=2, **options)
        return logprobs[possible], entropy

    assert torch.autograd.gradcheck(finite_outputs, (hidden, weight))


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - DETACHED))
def test_gradcheck_of_the_fused_loss(name):
    hidden, weight, teacher = make_head(num_rows=3, dtype=torch.float64)
    # Without a temperature: the teacher's then depends on the student, and counts as a constant in the gradient.
    options = {"vocab_size": 14, "stop_ids": (9, 2)}
    support = make_support(3, 4, options)
    teacher_logprobs, _ = dense_buckets(teacher, support, options)

    def loss(hidden, weight):
        token_weight = torch.tensor([0.5, 1.0, 2.0])
        arguments = (support, teacher_logprobs, token_weight, DIVERGENCES[name])
        return sparse_head_loss(hidden, weight, *arguments, chunk_rows=2, **options)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@EVERY_DIVERGENCE
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(name):
    hidden, weight, _ = make_head()
    support = make_support(7, 4)
    teacher_logprobs = bucket_logprobs(hidden, weight, support)[0].detach()
    loss, per_token = sparse_head_loss(hidden, weight, support, teacher_logprobs, torch.ones(7), DIVERGENCES[name])
    assert per_token.abs().max() < 1e-6
    assert max(grad.abs().max() for grad in gradients(loss, hidden, weight)) < 1e-5


@EVERY_DIVERGENCE
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


def test_bfloat16_errs_no_more_than_plain_pytorch_in_bfloat16():
    hidden, weight, teacher = make_head(num_rows=64, vocab=512, width=64, dtype=torch.bfloat16)
    with torch.no_grad():
        weight /= 4.0
    support = teacher.topk(16, dim=1).indices
    teacher_logprobs, _ = dense_buckets(teacher, support)

    def value_and_gradients(logprobs):
        value = reverse_kl(logprobs, teacher_logprobs.to(logprobs.dtype)).sum()
        return [value.detach().double(), *gradients(value, hidden, weight)]

    plain_logprobs = (hidden @ weight.T).log_softmax(1)
    outside = plain_logprobs.scatter(1, support, -math.inf).logsumexp(1, keepdim=True)
    plain = value_and_gradients(torch.cat([plain_logprobs.gather(1, support), outside], dim=1))
    oracle = value_and_gradients(dense_buckets(hidden.double() @ weight.double().T, support)[0])
    loss, _ = sparse_head_loss(hidden, weight, support, teacher_logprobs.float(), torch.ones(64), reverse_kl)
    fused = [loss.detach().double(), *gradients(loss, hidden, weight)]
    two_step = value_and_gradients(bucket_logprobs(hidden, weight, support, chunk_rows=9)[0])
    for ours in (fused, two_step):
        for actual, baseline, exact in zip(ours, plain, oracle, strict=True):
            assert (actual - exact).norm() <= 1.1 * (baseline - exact).norm()


def test_the_rest_keeps_its_logarithm_where_its_mass_underflows():
    logits = torch.zeros(1, 6)
    logits[0, 2:] = -200.0
    logprobs, entropy = bucket_logprobs(logits, torch.eye(6), torch.tensor([[0, 1]]))
    torch.testing.assert_close(logprobs[0, 2].item(), -200.0 + math.log(4.0) - math.log(2.0))
    torch.testing.assert_close(entropy.item(), math.log(2.0))


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100, None])
def test_the_size_of_a_chunk_changes_nothing(chunk_rows):
    hidden, weight, teacher = make_head(dtype=torch.float64)
    support = make_support(7, 4)
    teacher_logprobs, _ = dense_buckets(teacher, support)
    arguments = (hidden, weight, support, teacher_logprobs, torch.rand(7, dtype=torch.float64), reverse_kl)
    whole, chunked = sparse_head_loss(*arguments, chunk_rows=7), sparse_head_loss(*arguments, chunk_rows=chunk_rows)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(gradients(chunked[0], hidden, weight), gradients(whole[0], hidden, weight))


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


def test_a_rank_that_keeps_no_row_has_loss_zero_and_zero_gradients():
    _, weight, _ = make_head()
    hidden = torch.zeros(0, 5, requires_grad=True)
    support = torch.zeros(0, 4, dtype=torch.int64)
    loss, per_token = sparse_head_loss(hidden, weight, support, torch.zeros(0, 5), torch.zeros(0), reverse_kl)
    logprobs, entropy = bucket_logprobs(hidden, weight, support)
    assert loss.item() == 0.0
    assert per_token.shape == entropy.shape == (0,)
    for total in (loss, logprobs.sum() + entropy.sum()):
        grad_hidden, grad_weight = gradients(total, hidden, weight)
        assert grad_hidden.shape == (0, 5)
        assert grad_weight.shape == (16, 5)
        assert not grad_weight.any()


def test_backward_scales_with_the_upstream_gradient_and_can_run_twice():
    hidden, weight, teacher = make_head()
    support = make_support(7, 4)
    teacher_logprobs = dense_buckets(teacher, support)[0].float()
    loss, _ = sparse_head_loss(hidden, weight, support, teacher_logprobs, torch.ones(7), reverse_kl)
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    thrice = torch.autograd.grad(3.0 * loss, (hidden, weight))
    torch.testing.assert_close(thrice, tuple(3.0 * grad for grad in once))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation inside created; views are no new tensors."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, leaf.numel())
        return result


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
        ([4, 7, 4], (), "support_NU must name a token once a row, got 4 twice in row 2"),
        ([-1, 0, 0], (), "support_NU must name a token once a row, got 0 twice in row 2"),
        ([3, 9, 3], (3, 9), "support_NU must name a token once a row, got 3 twice in row 2"),
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
