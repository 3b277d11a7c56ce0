"""The functional interface against dense float64 oracles, against PyTorch's own expression, and against opsd's loss."""
# B sequences, T tokens, V vocabulary, N tokens of a list

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import DIVERGENCES, jsd, reverse_kl
from opsd.types import Selection
from tests.oracle import dense_divergence
from tip import functional
from tip.functional import importance_from_selection, token_stats, weighted_distillation_loss
from tip.scores import SCORES
from tip.selectors import SELECTORS

B, T, V = 3, 7, 50
MASK_BT = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]]).bool()


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(functional, "CHUNK_BYTES", 4 * V * 4)  # four rows: neither 21 nor 11 tokens divide by it


def make_logits(dtype=torch.float64, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = spread * torch.randn(2, B, T, V, generator=generator, dtype=torch.float64)
    importance = 2 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), importance.to(dtype)


def pytorch_loss(student, teacher, importance, temperature):
    """The definition, in the words of a PyTorch user."""
    kl = F.kl_div(F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1), reduction="none")
    return (kl.sum(-1) * importance).mean()


def value_and_grad(loss_of, student, *others):
    student = student.detach().clone().requires_grad_()
    loss = loss_of(student, *others)
    (grad,) = torch.autograd.grad(loss, student)
    return loss.detach().double(), grad.double()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_kl_is_as_near_to_the_exact_value_as_pytorchs_own_expression(dtype, temperature):
    given = make_logits(dtype)
    exact = value_and_grad(lambda *args: pytorch_loss(*args, temperature), *(x.double() for x in given))
    plain = value_and_grad(lambda *args: pytorch_loss(*args, temperature), *given)
    ours = value_and_grad(partial(weighted_distillation_loss, temperature=temperature), *given)
    a_little = {torch.float64: 1e-15, torch.float32: 1e-7, torch.bfloat16: 0.0}[dtype]
    for our, pytorchs, right in zip(ours, plain, exact, strict=True):
        assert (our - right).norm() <= (pytorchs - right).norm() + a_little * right.norm()


def test_dtypes_of_loss_and_gradient():
    for dtype, loss_dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        student, teacher, importance = make_logits(dtype)
        loss = weighted_distillation_loss(student, teacher, importance)
        loss.backward()
        assert (loss.dtype, student.grad.dtype) == (loss_dtype, dtype)


def test_importance_of_0_and_1_is_training_on_the_subset_times_its_share():
    student, teacher, _ = make_logits()
    importance = MASK_BT.double()
    loss, grad = value_and_grad(weighted_distillation_loss, student, teacher, importance)
    subset = student[MASK_BT][None], teacher[MASK_BT][None], torch.ones(1, int(MASK_BT.sum()))
    subset_loss, subset_grad = value_and_grad(weighted_distillation_loss, *subset)
    share = MASK_BT.double().mean()
    torch.testing.assert_close(loss, share * subset_loss)
    torch.testing.assert_close(grad[MASK_BT], share * subset_grad[0])
    assert not grad[~MASK_BT].any()


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64])
def test_the_mean_is_over_valid_tokens_and_others_may_hold_anything(mask_dtype):
    student, teacher, importance = make_logits()
    expected = weighted_distillation_loss(student[MASK_BT][None], teacher[MASK_BT][None], importance[MASK_BT][None])
    for tensor in (student.data, teacher, importance):
        tensor[~MASK_BT] = math.nan
    loss = weighted_distillation_loss(student, teacher, importance, mask_BT=MASK_BT.to(mask_dtype))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert not student.grad[~MASK_BT].any()
    assert student.grad[MASK_BT].any(-1).all()


def test_without_a_valid_token_loss_and_gradient_are_zero():
    student, teacher, importance = make_logits()
    loss = weighted_distillation_loss(student, teacher, importance, mask_BT=torch.zeros(B, T, dtype=torch.bool))
    loss.backward()
    assert loss == 0.0
    assert not student.grad.any()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"])
def test_a_named_divergence_is_the_dense_one(name):
    student, teacher, importance = make_logits()
    dense = dense_divergence(name, student.flatten(0, 1) / 1.7, teacher.flatten(0, 1) / 1.7)
    (expected_grad,) = torch.autograd.grad((dense * importance.flatten()).mean(), student)
    loss = weighted_distillation_loss(student, teacher, importance, temperature=1.7, divergence=name)
    loss.backward()
    torch.testing.assert_close(loss, (dense * importance.flatten()).mean())
    torch.testing.assert_close(student.grad, expected_grad)


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_every_divergence_needs_no_rest_bucket(name):
    """The learner's rows end in a rest bucket. With every token named it is empty, and can be left out."""

    def with_empty_rest(student_NV, teacher_NV):
        rest_N1 = torch.full((len(student_NV), 1), -math.inf, dtype=student_NV.dtype)
        return DIVERGENCES[name](torch.cat([student_NV, rest_N1], 1), torch.cat([teacher_NV, rest_N1], 1))

    student, *others = make_logits()
    without = value_and_grad(partial(weighted_distillation_loss, divergence=name), student, *others)
    with_rest = value_and_grad(partial(weighted_distillation_loss, divergence=with_empty_rest), student, *others)
    torch.testing.assert_close(without, with_rest)


def test_a_divergence_can_be_a_function():
    student, teacher, importance = make_logits()
    loss = weighted_distillation_loss(student, teacher, importance, divergence=partial(jsd, beta=0.9))
    dense = dense_divergence("jsd", student.detach().flatten(0, 1), teacher.flatten(0, 1), beta=0.9)
    torch.testing.assert_close(loss.detach(), (dense * importance.flatten()).mean())


def test_the_gradient_is_of_the_student_alone_and_follows_what_comes_after_the_loss():
    student, teacher, importance = make_logits()
    teacher.requires_grad_(), importance.requires_grad_()
    loss = weighted_distillation_loss(student, teacher, importance)
    _, grad = value_and_grad(weighted_distillation_loss, student, teacher, importance)
    (-3 * loss).backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, -2 * grad)
    assert teacher.grad is None and importance.grad is None


def test_a_padded_vocabulary_entry_takes_no_part():
    student, teacher, importance = make_logits()
    cut = value_and_grad(weighted_distillation_loss, student[..., :-2], teacher[..., :-2], importance)
    for logits in (student.data, teacher):
        logits[..., -2:] = -math.inf
    loss, grad = value_and_grad(weighted_distillation_loss, student, teacher, importance)
    torch.testing.assert_close((loss, grad[..., :-2]), cut)
    assert not grad[..., -2:].any()


class LargeTensors(TorchDispatchMode):
    """Keeps the storages of at least so many bytes that come out of torch's operations."""

    def __init__(self, least_bytes):
        super().__init__()
        self.least_bytes = least_bytes
        self.found = {}  # by address; kept, so that none is given out twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and each.untyped_storage().nbytes() >= self.least_bytes:
                self.found[each.untyped_storage().data_ptr()] = each
        return made

    def beside(self, *tensors):
        return len(self.found.keys() - {each.untyped_storage().data_ptr() for each in tensors})


def test_no_second_tensor_of_the_logits_size_is_made(monkeypatch):
    monkeypatch.setattr(functional, "CHUNK_BYTES", 1 << 18)

    def sliced_logits():  # not contiguous, like logits[:, :-1]
        return torch.randn(1, 65, 1 << 15)[:, :-1]

    student, teacher = sliced_logits().requires_grad_(), sliced_logits()
    mask = torch.ones(student.shape[:2], dtype=torch.bool)
    half = student.numel() * student.element_size() // 2
    with LargeTensors(half) as large:
        token_stats(student, teacher, mask)
        loss = weighted_distillation_loss(student, teacher, mask, mask_BT=mask)
    assert large.beside(student, teacher) == 0
    with LargeTensors(half) as large:
        torch.autograd.grad(loss, student)  # backward() would copy a gradient that somebody else holds
    assert large.beside(student, teacher) == 1  # the gradient
    with LargeTensors(half) as large:  # the plain way makes several: they would be seen
        weighted = (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum()
    assert large.beside(student, teacher) >= 3 and weighted.ndim == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_logits_BTV": torch.zeros(T, V)}, r"student_logits_BTV must have shape \(B, T, V\), got \(7, 50\)"),
        ({"teacher_logits_BTV": torch.zeros(B, T, 51)}, r"teacher_logits_BTV .* \(3, 7, 50\), got \(3, 7, 51\)"),
        ({"importance_BT": torch.zeros(B, T + 1)}, r"importance_BT must have shape \(3, 7\), got \(3, 8\)"),
        ({"mask_BT": MASK_BT[:1]}, r"mask_BT must have shape \(3, 7\), got \(1, 7\)"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"divergence": "backward_kl"}, "one of reverse_kl, forward_kl, .*, got 'backward_kl'"),
        ({"divergence": lambda s, t: reverse_kl(s, t).mean()}, r"divergence must return shape \(4,\), got \(\)"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    student, teacher, importance = make_logits()
    arguments = {"student_logits_BTV": student, "teacher_logits_BTV": teacher, "importance_BT": importance}
    with pytest.raises(ValueError, match=message):
        weighted_distillation_loss(**(arguments | change))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_token_stats_are_the_dense_ones_sequence_after_sequence(dtype):
    student, teacher, _ = make_logits(dtype)
    student_NV, teacher_NV = student.detach()[MASK_BT].double(), teacher[MASK_BT].double()
    student.data[~MASK_BT], teacher[~MASK_BT] = math.nan, math.nan
    stats = token_stats(student, teacher, MASK_BT)
    entropy = torch.distributions.Categorical(logits=student_NV).entropy() / math.log(V)
    tolerance = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 1e-6, "rtol": 1e-5}
    check = partial(torch.testing.assert_close, check_dtype=False, **tolerance)
    check(stats.entropy_T, entropy)
    check(stats.reverse_kl_T, dense_divergence("reverse_kl", student_NV, teacher_NV))
    check(stats.forward_kl_T, dense_divergence("forward_kl", student_NV, teacher_NV))
    assert stats.entropy_T.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not stats.reverse_kl_T.requires_grad


def test_token_stats_hold_what_the_further_scores_need():
    student, teacher, _ = make_logits()
    stats = token_stats(student, teacher, MASK_BT)
    p, q = student[MASK_BT].softmax(-1), teacher[MASK_BT].softmax(-1)
    torch.testing.assert_close(stats.extra["hellinger_T"], (1 - (p * q).sqrt().sum(-1)).sqrt().detach())
    logits = student[MASK_BT].detach().requires_grad_()
    (logits.softmax(-1) * (logits.log_softmax(-1) - q.log())).sum().backward()
    torch.testing.assert_close(stats.extra["grad_norm_T"], logits.grad.norm(dim=-1))
    likely = p >= p.sort(-1).values[:, -16:-15]
    torch.testing.assert_close(stats.compatibility_T, (q * likely).sum(-1))
    teacher_entropy = torch.distributions.Categorical(probs=q).entropy() / math.log(V)
    torch.testing.assert_close(stats.teacher_entropy_T, teacher_entropy)
    assert torch.equal(stats.named_mass_T, torch.ones_like(stats.entropy_T))
    for name in ("hellinger", "grad_norm", "teachability"):
        assert len(SCORES[name](stats)) == int(MASK_BT.sum())


def test_token_stats_of_equal_models_and_of_none():
    uniform = torch.zeros(B, T, V)
    stats = token_stats(uniform, uniform, MASK_BT)
    assert len(stats) == MASK_BT.sum()
    assert (stats.entropy_T > 1 - 1e-6).all() and (stats.entropy_T <= 1).all()
    assert not stats.reverse_kl_T.any() and not stats.forward_kl_T.any()
    assert len(token_stats(uniform, uniform, torch.zeros_like(MASK_BT))) == 0


def test_importance_puts_the_weights_where_the_mask_counts_them():
    selection = Selection(index_N=torch.tensor([0, 2, 3, 10]), weight_N=torch.tensor([1.0, 2.0, 0.5, 4.5]))
    expected = torch.zeros(B, T)
    expected[0, 0], expected[0, 2], expected[1, 1], expected[2, 4] = selection.weight_N
    assert torch.equal(importance_from_selection(selection, MASK_BT), expected)
    assert torch.equal(importance_from_selection(selection, MASK_BT.long()), expected)
    normalised = importance_from_selection(selection, MASK_BT, normalise=True)
    torch.testing.assert_close(normalised, expected * 11 / 8)
    with pytest.raises(ValueError, match="the 10 tokens of mask_BT, got index 10"):
        importance_from_selection(selection, MASK_BT & (torch.arange(T) < 6))


def test_from_logits_to_loss_it_is_the_learners_own():
    """Scores, selection and normalised importance on dense logits: opsd's loss where every token is named."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, T, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, 5, generator=generator, dtype=torch.float64)
    teacher = torch.randn(B, T, V, generator=generator, dtype=torch.float64)
    student = hidden @ weight.T
    score = SCORES["soft_or"](token_stats(student, teacher, MASK_BT))
    selection = SELECTORS["top_ratio"](score, MASK_BT.sum(1), ratio=0.5)
    importance = importance_from_selection(selection, MASK_BT, normalise=True)
    loss = weighted_distillation_loss(student, teacher, importance, mask_BT=MASK_BT, divergence="reverse_kl")
    (grad,) = torch.autograd.grad(loss, hidden)

    kept_N, num_kept = selection.index_N, len(selection)
    assert num_kept == 1 + 3 + 1
    rest_N1 = torch.full((num_kept, 1), -math.inf, dtype=torch.float64)
    expected, _ = sparse_head_loss(
        hidden[MASK_BT][kept_N],
        weight,
        torch.arange(V).expand(num_kept, V),
        torch.cat([teacher[MASK_BT][kept_N].log_softmax(-1), rest_N1], 1),
        selection.weight_N / selection.weight_N.sum(),
        reverse_kl,
    )
    (expected_grad,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close((loss, grad), (expected, expected_grad))
