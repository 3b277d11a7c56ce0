"""Heads with a bias, a scale and a soft cap against dense float64 computations: values and all three gradients."""
# N rows, D width, V vocabulary, U support size, B = U + 1 buckets

import math

import pytest
import torch

from opsd.ops.head import whole_rows
from opsd.ops.head.form import PLAIN, HeadForm
from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import DIVERGENCES, forward_kl, reverse_kl
from tests.opsd.ops.head.largest_tensor import LargestTensor
from tests.opsd.ops.head.reference import (
    EVERY_HEAD,
    assert_near,
    dense_buckets,
    dense_events,
    dense_logits,
    gradients,
    head_options,
    known_of,
    make_head,
    make_support,
    outside_of,
    tempered_teacher,
)

# Caps below the largest logits, which are about 6: a tanh that is left out, or is not differentiated, shows.
FORMS = {
    "bias": (True, PLAIN),
    "scale": (False, HeadForm(scale=0.3)),
    "cap": (False, HeadForm(soft_cap=2.0)),
    "bias, scale and cap": (True, HeadForm(scale=1.7, soft_cap=3.0)),
}
EVERY_FORM = pytest.mark.parametrize("form", list(FORMS))
SMALL_BLOCKS = PLANS["cpu"]._replace(block_columns=5)
EVERY_PLAN = pytest.mark.parametrize("plan", [SMALL_BLOCKS, PLANS["cuda"]], ids=["cpu", "cuda"])


@pytest.fixture(autouse=True)
def small_sums(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(whole_rows, "SUM_COLUMNS", 5)


def form_options(form, vocab=16, dtype=torch.float32):
    """The arguments of a head of this form; its bias requires a gradient."""
    has_bias, head_form = FORMS[form]
    options = {"form": head_form}
    if has_bias:
        draw = torch.randn(vocab, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        options["bias_V"] = draw.to(dtype).requires_grad_()
    return options


def leaves_of(hidden, weight, options):
    return [hidden, weight, *([options["bias_V"]] if "bias_V" in options else [])]


@pytest.mark.parametrize("name", ["reverse_kl", "todi"])
@EVERY_FORM
@EVERY_HEAD
@EVERY_PLAN
def test_the_fused_loss_has_value_and_gradients_of_the_coarse_divergence(name, form, head, plan):
    hidden, weight, teacher = make_head()
    options = {**head_options(head, 7), **form_options(form)}
    support = make_support(7, 4, options)
    support[4] = -1  # a row that names nothing
    teacher_logprobs = known_of(teacher, support, options)
    token_weight, leaves = torch.rand(7), leaves_of(hidden, weight, options)
    for chunk_rows in (2, 7):
        arguments = (hidden, weight, support, teacher_logprobs, token_weight, DIVERGENCES[name])
        loss, per_token = sparse_head_loss(*arguments, chunk_rows=chunk_rows, plan=plan, **options)
        logits = dense_logits(hidden, weight, options)
        student_logprobs, _ = dense_buckets(logits, support, options)
        coarse = DIVERGENCES[name](student_logprobs, tempered_teacher(teacher_logprobs, logits, support, options))
        assert_near(per_token, coarse, 1e-5)
        expected = gradients((token_weight * coarse).sum(), *leaves)
        for actual, wanted in zip(gradients(loss, *leaves), expected, strict=True):
            assert_near(actual, wanted, 1e-5)


@EVERY_FORM
@EVERY_HEAD
@EVERY_PLAN
@pytest.mark.parametrize("entropy_share", [0.0, 1.0])
def test_buckets_and_entropy_equal_a_dense_computation(form, head, plan, entropy_share):
    hidden, weight, _ = make_head()
    options = {**head_options(head, 7), **form_options(form)}
    support = make_support(7, 4, options)
    support[4] = -1
    results = bucket_logprobs(hidden, weight, support, chunk_rows=3, plan=plan, **options)
    dense = dense_buckets(dense_logits(hidden, weight, options), support, options)
    for actual, expected in zip(results, dense, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    upstream, leaves = (torch.rand(7, 5), torch.full((7,), entropy_share)), leaves_of(hidden, weight, options)
    actual = torch.autograd.grad(results, leaves, upstream)
    expected = torch.autograd.grad(dense, leaves, tuple(grad.double() for grad in upstream))
    for left, right in zip(actual, expected, strict=True):
        assert_near(left, right.double(), 1e-5)


@EVERY_HEAD
@EVERY_PLAN
def test_gradcheck_of_buckets_and_entropy(head, plan):
    hidden, weight, _ = make_head(num_rows=3, dtype=torch.float64)
    options = {**head_options(head, 3), **form_options("bias, scale and cap", dtype=torch.float64)}
    bias, support = options.pop("bias_V"), make_support(3, 4, options)
    possible = torch.cat([support >= 0, torch.ones(3, 1, dtype=torch.bool)], dim=1)

    def finite_outputs(hidden, weight, bias):
        results = bucket_logprobs(hidden, weight, support, chunk_rows=2, plan=plan, bias_V=bias, **options)
        return results[0][possible], results[1]

    assert torch.autograd.gradcheck(finite_outputs, (hidden, weight, bias))


@EVERY_PLAN
def test_gradcheck_of_the_fused_loss(plan):
    hidden, weight, teacher = make_head(num_rows=3, dtype=torch.float64)
    # Without a temperature: the teacher's then depends on the student, and counts as a constant in the gradient.
    options = {"vocab_size": 14, "stop_ids": (9, 2), **form_options("bias, scale and cap", dtype=torch.float64)}
    bias, support = options.pop("bias_V"), make_support(3, 4, options)
    teacher_logprobs, _ = dense_buckets(teacher, support, options)

    def loss(hidden, weight, bias):
        arguments = (support, teacher_logprobs, torch.tensor([0.5, 1.0, 2.0]), forward_kl)
        return sparse_head_loss(hidden, weight, *arguments, chunk_rows=2, plan=plan, bias_V=bias, **options)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


@pytest.mark.parametrize("num_named", [0, 13, 14])
@EVERY_PLAN
def test_a_support_may_name_everything_or_nothing(num_named, plan):
    hidden, weight, teacher = make_head(dtype=torch.float64)
    options = {"stop_ids": (9, 2, 11), **form_options("bias, scale and cap", dtype=torch.float64)}
    allowed = torch.tensor([v for v in range(16) if v not in (2, 11)])
    support = torch.stack([allowed[torch.randperm(14)[:num_named]] for _ in range(7)])
    support[::2, num_named // 2 :] = -1
    teacher_logprobs, leaves = known_of(teacher, support, options), leaves_of(hidden, weight, options)
    loss, per_token = sparse_head_loss(
        hidden, weight, support, teacher_logprobs, torch.ones(7), forward_kl, plan=plan, chunk_rows=4, **options
    )
    probs = dense_events(dense_logits(hidden, weight, options), options)
    rest = (probs * outside_of(support, 16)).sum(1, keepdim=True)
    # The rest of a row that names all is impossible for both models: it adds 0.
    student = torch.cat([probs.gather(1, support.clamp_min(0)), rest], dim=1).clamp_min(1e-300).log()
    teacher_probs = teacher_logprobs.exp()
    dense = (torch.xlogy(teacher_probs, teacher_probs) - teacher_probs * student).sum(1)
    torch.testing.assert_close(per_token, dense, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(loss, *leaves), gradients(dense.sum(), *leaves), rtol=1e-9, atol=1e-12)


def test_bfloat16_errs_no_more_than_plain_pytorch_in_bfloat16():
    hidden, weight, teacher = make_head(num_rows=64, vocab=512, width=64, dtype=torch.bfloat16)
    with torch.no_grad():
        weight /= 4.0
    options = form_options("bias, scale and cap", vocab=512, dtype=torch.bfloat16)
    leaves, form = leaves_of(hidden, weight, options), options["form"]
    support = teacher.topk(16, dim=1).indices
    teacher_logprobs, _ = dense_buckets(teacher, support)

    def value_and_gradients(logprobs):
        value = reverse_kl(logprobs, teacher_logprobs.to(logprobs.dtype)).sum()
        return [value.detach().double(), *gradients(value, *leaves)]

    plain_logits = torch.tanh(form.scale * (hidden @ weight.T + options["bias_V"]) / form.soft_cap) * form.soft_cap
    plain_logprobs = plain_logits.log_softmax(1)
    outside = plain_logprobs.scatter(1, support, -math.inf).logsumexp(1, keepdim=True)
    plain = value_and_gradients(torch.cat([plain_logprobs.gather(1, support), outside], dim=1))
    oracle = value_and_gradients(dense_buckets(dense_logits(hidden, weight, options), support)[0])
    for plan in (PLANS["cpu"], PLANS["cuda"]):
        arguments = (hidden, weight, support, teacher_logprobs.float(), torch.ones(64), reverse_kl)
        loss, _ = sparse_head_loss(*arguments, plan=plan, **options)
        two_step = bucket_logprobs(hidden, weight, support, chunk_rows=9, plan=plan, **options)[0]
        for ours in ([loss.detach().double(), *gradients(loss, *leaves)], value_and_gradients(two_step)):
            for actual, baseline, exact in zip(ours, plain, oracle, strict=True):
                assert (actual - exact).norm() <= 1.1 * (baseline - exact).norm()


@EVERY_FORM
def test_the_filter_errs_within_its_bound_and_never_in_the_bias(form):
    hidden, weight, teacher = make_head(num_rows=20, vocab=200, dtype=torch.float64)
    with torch.no_grad():
        hidden *= 3.0
    options = form_options(form, vocab=200, dtype=torch.float64)
    support, scale = make_support(20, 4, {"vocab_size": 200}), options["form"].scale
    teacher_logprobs, leaves = dense_buckets(teacher, support)[0], leaves_of(hidden, weight, options)
    results = {}
    for threshold in (0.0, 1e-2):
        arguments = (hidden, weight, support, teacher_logprobs, torch.ones(20), reverse_kl)
        loss, _ = sparse_head_loss(*arguments, plan=SMALL_BLOCKS, chunk_rows=3, filter_threshold=threshold, **options)
        results[threshold] = gradients(loss, *leaves)
    logits = dense_logits(hidden, weight, options).detach().requires_grad_()
    value = reverse_kl(dense_buckets(logits, support)[0], teacher_logprobs).sum()
    row_sum = scale * torch.autograd.grad(value, logits)[0].abs().sum(1)
    error_hidden, error_weight = (
        (one - other).norm(dim=1) for one, other in zip(results[0.0][:2], results[1e-2][:2], strict=True)
    )
    assert (error_hidden > 0.0).any()  # something was left out
    assert (error_hidden <= 1e-2 * 200 * weight.norm(dim=1).max() * row_sum).all()
    assert (error_weight <= 1e-2 * (hidden.norm(dim=1) * row_sum).sum()).all()
    assert all(torch.equal(one, other) for one, other in zip(results[0.0][2:], results[1e-2][2:], strict=True))


def test_the_filter_keeps_the_same_columns_whatever_the_scale():
    hidden, weight, teacher = make_head(num_rows=20, vocab=200, dtype=torch.float64)
    support = make_support(20, 4, {"vocab_size": 200})
    arguments = (support, dense_buckets(teacher, support)[0], torch.ones(20), reverse_kl)
    grads = []
    for scale in (1.0, 8.0, 1 / 8):
        options = {"form": HeadForm(scale=scale), "filter_threshold": 1e-2, "chunk_rows": 3, "plan": SMALL_BLOCKS}
        loss, _ = sparse_head_loss(hidden / scale, weight, *arguments, **options)
        grads.append(torch.autograd.grad(loss, weight)[0])
    loss, _ = sparse_head_loss(hidden, weight, *arguments, filter_threshold=0.0)
    assert not torch.allclose(grads[0], torch.autograd.grad(loss, weight)[0])
    torch.testing.assert_close(grads[1:], grads[:1] * 2)


@EVERY_PLAN
def test_logits_far_beyond_the_cap_have_a_gradient_of_zero(plan):
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    beyond = torch.where(torch.arange(16) % 3 == 0, 400.0, -400.0)
    weight = torch.stack([beyond, torch.linspace(-0.1, 0.1, 16)], dim=1).requires_grad_()
    options = {"form": HeadForm(soft_cap=30.0), "stop_ids": (3, 12), "temperature_N": torch.tensor([2.0, 0.5])}
    support = torch.tensor([[3, 5, 15], [15, 4, -1]])
    arguments = (support, known_of(torch.zeros(2, 16), support, options), torch.ones(2), reverse_kl)
    loss, _ = sparse_head_loss(hidden, weight, *arguments, plan=plan, **options)
    grad_hidden, grad_weight = gradients(loss, hidden, weight)
    assert grad_hidden[0].abs().max() < 1e-3 and grad_hidden[1].abs().max() > 1e-3
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("form", ["cap", "bias, scale and cap"])
@EVERY_PLAN
def test_a_row_that_is_not_a_number_is_seen(form, plan):
    hidden, weight, teacher = make_head()
    options = form_options(form)
    with torch.no_grad():
        hidden[3, 0] = math.nan
    support = make_support(7, 4)
    arguments = (support, dense_buckets(teacher, support)[0].float(), torch.ones(7), reverse_kl)
    loss, per_token = sparse_head_loss(hidden, weight, *arguments, plan=plan, **options)
    assert not loss.isfinite() and per_token.isfinite().sum() == 6
    assert not any(grad.isfinite().all() for grad in gradients(loss, *leaves_of(hidden, weight, options)))


@EVERY_PLAN
def test_a_rank_that_keeps_no_row_gives_the_bias_a_gradient_of_zeros(plan):
    _, weight, _ = make_head()
    hidden, options = torch.zeros(0, 5, requires_grad=True), form_options("bias, scale and cap")
    support = torch.zeros(0, 4, dtype=torch.int64)
    arguments = (hidden, weight, support, torch.zeros(0, 5), torch.zeros(0), reverse_kl)
    loss, _ = sparse_head_loss(*arguments, plan=plan, **options)
    logprobs, entropy = bucket_logprobs(hidden, weight, support, plan=plan, **options)
    for total in (loss, logprobs.sum() + entropy.sum()):
        assert torch.equal(*(gradients(total, options["bias_V"])), torch.zeros(16, dtype=torch.float64))


@EVERY_PLAN
def test_only_the_gradients_that_are_needed_are_made_and_the_second_backward_makes_them_anew(plan):
    hidden, weight, teacher = make_head()
    options, support = form_options("bias, scale and cap"), make_support(7, 4)
    arguments = (support, dense_buckets(teacher, support)[0].float(), torch.ones(7), reverse_kl)
    loss, _ = sparse_head_loss(hidden, weight, *arguments, plan=plan, **options)
    leaves = leaves_of(hidden, weight, options)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3.0 * loss, leaves)
    torch.testing.assert_close(again, tuple(3.0 * grad for grad in first))
    frozen = (hidden.detach(), weight.detach())
    for value in (
        sparse_head_loss(*frozen, *arguments, plan=plan, **options)[0],
        reverse_kl(bucket_logprobs(*frozen, support, plan=plan, **options)[0], arguments[1]).sum(),
    ):
        torch.testing.assert_close(torch.autograd.grad(value, options["bias_V"])[0], first[2])


def test_a_cap_takes_no_tensor_of_rows_times_vocabulary_more():
    hidden, weight, teacher = make_head(num_rows=60, vocab=400, width=2)
    support = make_support(60, 4, {"vocab_size": 400})
    arguments = (support, dense_buckets(teacher, support)[0].float(), torch.ones(60), reverse_kl)
    options = form_options("bias, scale and cap", vocab=400)
    for plan in (PLANS["cuda"], SMALL_BLOCKS):
        with LargestTensor() as largest:
            sparse_head_loss(hidden, weight, *arguments, chunk_rows=20, plan=plan, **options)
        assert largest.numel == 20 * 400  # the shares of a chunk
