"""The divergence over the whole vocabulary against dense float64 computations: values and both gradients."""
# N rows, V rows of the student's head

import math

import pytest
import torch

from opsd.ops.head.exact import exact_head_loss
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import DIVERGENCES
from opsd.ops.losses.objective import Objective
from tests.opsd.ops.head.exact_reference import N, V, by_name, dense_results, make_pair, results, row_weights
from tests.opsd.ops.head.reference import assert_near

SHARED = 20  # ids, fewer than either head has rows
EVERY_DIVERGENCE = pytest.mark.parametrize("name", sorted(DIVERGENCES))
DETACHED = {"todi", "akl"}  # their gradient is not the derivative of their value
EVERY_HEAD = pytest.mark.parametrize(
    "head",
    [
        {},
        {"temperature": True},
        {"stop_ids": (11, 2, 17)},
        {"foreign_ids": (0, 5, 6, 7, 8, 9)},  # a whole block
        {"temperature": True, "stop_ids": (2, 9), "foreign_ids": (3, 19)},
    ],
    ids=lambda head: "+".join(head) or "plain",
)
EVERY_PLAN = pytest.mark.parametrize(
    "plan", [PLANS["cpu"]._replace(block_columns=5), PLANS["cuda"]], ids=["blocks", "whole"]
)


def head_options(head, num_rows=N):
    options = {"vocab_size": SHARED, **head}
    if options.pop("temperature", False):
        options["temperature_N"] = torch.linspace(0.5, 2.0, num_rows)
    return options


def assert_equal(found, expected, relative=1e-5):
    for actual, wanted in zip(found, expected, strict=True):
        assert_near(actual, wanted, relative)


@EVERY_DIVERGENCE
@EVERY_HEAD
@EVERY_PLAN
def test_value_and_gradients_are_those_of_the_dense_divergence(name, head, plan):
    pair, options = make_pair(), head_options(head)
    found = results(pair, DIVERGENCES[name], chunk_rows=3, plan=plan, **options)
    assert_equal(found, dense_results(name, pair, options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("jsd", {"beta": 0.0}),
        ("jsd", {"beta": 0.2}),
        ("jsd", {"beta": 1.0}),
        ("skew_forward_kl", {"alpha": 0.7}),
        ("skew_reverse_kl", {"alpha": 0.7}),
        ("akl", {"head_mass": 0.2}),
        ("akl", {"head_mass": 0.7, "crossing": "tail"}),
        ("abkd", {"alpha": 1.5, "beta": 0.3}),
        ("entropy_aware", {"threshold": 2.0}),
    ],
)
def test_options_reach_the_divergence_and_what_it_needs_of_whole_rows(name, options):
    pair = make_pair(scale=0.8)
    found = results(pair, by_name(name, **options), plan=PLANS["cpu"]._replace(block_columns=5), vocab_size=SHARED)
    assert_equal(found, dense_results(name, pair, {"vocab_size": SHARED}, **options))
    default = dense_results(name, pair, {"vocab_size": SHARED})
    assert (found[0] - default[0]).abs().max() > 1e-3  # the option does something here


@EVERY_DIVERGENCE
@pytest.mark.parametrize("chunk_rows", [1, 4, 100, None])
def test_the_size_of_a_chunk_changes_nothing(name, chunk_rows):
    pair, options = make_pair(dtype=torch.float64), head_options({"temperature": True, "stop_ids": (2, 9)})
    assert_equal(
        results(pair, DIVERGENCES[name], chunk_rows=chunk_rows, **options), dense_results(name, pair, options), 1e-12
    )


@EVERY_DIVERGENCE
def test_it_equals_the_sparse_loss_whose_support_names_every_token(name):
    pair, stop_ids = make_pair(teacher_vocab=V, dtype=torch.float64), (4, 9)
    support = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(row)) for row in range(N)])
    support = support[support != stop_ids[1]].view(N, V - 1)
    logits = pair[2] @ pair[3].T
    logits[:, stop_ids[0]] = logits[:, list(stop_ids)].logsumexp(1)
    teacher = torch.cat([logits.gather(1, support).log_softmax(1), torch.full((N, 1), -math.inf)], dim=1)
    loss, per_token = sparse_head_loss(
        *pair[:2], support, teacher, row_weights(N), DIVERGENCES[name], stop_ids=stop_ids, filter_threshold=0.0
    )
    sparse = per_token, *torch.autograd.grad(loss, pair[:2])
    assert_equal(results(pair, DIVERGENCES[name], stop_ids=stop_ids), sparse, 1e-9)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - DETACHED))
def test_gradcheck(name):
    hidden, weight, *teacher = make_pair(num_rows=2, vocab=21, teacher_vocab=21, width=3, dtype=torch.float64)
    options = {**head_options({"temperature": True, "stop_ids": (9, 2), "foreign_ids": (4,)}, 2), "chunk_rows": 1}
    plan = PLANS["cpu"]._replace(block_columns=5)

    def loss(hidden, weight):
        return exact_head_loss(hidden, weight, *teacher, row_weights(2), DIVERGENCES[name], plan=plan, **options)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@EVERY_DIVERGENCE
def test_rows_of_a_nearly_certain_student_keep_their_values_and_gradients(name):
    """Each row for itself: its loss is a millionth of that of other rows, and so it is in float32 by plain formulas."""
    generator = torch.Generator().manual_seed(0)
    rows, tokens = 12, 64
    hidden = torch.cat([torch.linspace(8.0, 16.0, rows).diag(), torch.randn(rows, 6, generator=generator)], dim=1)
    weight = torch.cat([torch.eye(tokens, rows), 0.4 * torch.randn(tokens, 6, generator=generator)], dim=1)
    shift = 0.3 * torch.randn(rows, rows + 6, generator=generator)
    pair = hidden.requires_grad_(), weight.requires_grad_(), (hidden + shift).detach(), weight.detach().clone()
    assert (hidden @ weight.T).softmax(1).amax(1).median() > 0.999
    found = results(pair, DIVERGENCES[name], plan=PLANS["cpu"]._replace(block_columns=10), filter_threshold=0.0)
    expected = dense_results(name, pair, {})
    assert ((found[0] - expected[0]).abs() <= 1e-4 * expected[0].abs()).all()
    assert ((found[1] - expected[1]).norm(dim=1) <= 1e-4 * expected[1].norm(dim=1)).all()
    assert_near(found[2], expected[2], 1e-5)


@EVERY_DIVERGENCE
@pytest.mark.parametrize("plan", [PLANS["cpu"]._replace(block_columns=128), PLANS["cuda"]], ids=["cpu", "cuda"])
def test_bfloat16_inputs_lose_no_more_than_the_rounding_of_what_is_returned(name, plan):
    """Logits near 20, where one in bfloat16 would be off by up to 0.06."""
    sizes = {"num_rows": 48, "vocab": 600, "teacher_vocab": 600, "width": 64, "teacher_width": 32}
    pair = [tensor.detach() for tensor in make_pair(**sizes)]
    for hidden, weight in (pair[:2], pair[2:]):
        weight /= 8.0
        hidden *= 20.0 / (hidden @ weight.T).amax(1, keepdim=True)
    hidden, weight, *teacher = (tensor.bfloat16() for tensor in pair)
    pair = hidden.requires_grad_(), weight.requires_grad_(), *teacher
    found, expected = results(pair, DIVERGENCES[name], plan=plan, chunk_rows=20), dense_results(name, pair, {})
    assert found[0].dtype == torch.float32
    assert ((found[0] - expected[0]).abs() <= 1e-4 * expected[0]).all()
    # On CUDA the gradient in the logits is rounded before it is multiplied; errors of that size add up as noise does.
    allowed = 1.02 if plan.block_columns else 2.0
    for actual, wanted in zip(found[1:], expected[1:], strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual.double() - wanted).norm() <= allowed * (wanted.bfloat16().double() - wanted).norm()


def test_the_models_may_differ_in_dtype():
    hidden, weight, *teacher = make_pair()
    pair = hidden, weight, *(tensor.bfloat16() for tensor in teacher)
    assert_equal(
        results(pair, DIVERGENCES["jsd"], vocab_size=SHARED), dense_results("jsd", pair, {"vocab_size": SHARED})
    )


def test_several_terms_and_the_inputs_of_rows():
    pair, share = make_pair(), torch.linspace(0.0, 1.0, N)
    objective = Objective(
        parts=((1.0, by_name("forward_then_reverse")), (0.25, by_name("akl")), (0.5, by_name("akl", head_mass=0.2)))
    )
    found = results(pair, objective, row_inputs={"reverse_share_N": share}, chunk_rows=2, vocab_size=SHARED)
    options = {"vocab_size": SHARED}
    forward, reverse = (dense_results(name, pair, options)[0] for name in ("forward_kl", "reverse_kl"))
    akl = 0.25 * dense_results("akl", pair, options)[0] + 0.5 * dense_results("akl", pair, options, head_mass=0.2)[0]
    assert_near(found[0], (1 - share) * forward + share * reverse + akl, 1e-5)


@EVERY_DIVERGENCE
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(name):
    hidden, weight, _, _ = make_pair()
    per_token, *grads = results((hidden, weight, hidden.detach(), weight.detach()), DIVERGENCES[name])
    assert per_token.abs().max() < 1e-6
    assert max(grad.abs().max() for grad in grads) < 1e-5


def test_the_teacher_is_a_constant():
    hidden, weight, *teacher = make_pair(teacher_vocab=V)
    teacher = [tensor.requires_grad_() for tensor in teacher]
    loss, per_token = exact_head_loss(hidden, weight, *teacher, row_weights(N), DIVERGENCES["reverse_kl"])
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None and not per_token.requires_grad
    assert all(tensor.grad is None for tensor in teacher)
