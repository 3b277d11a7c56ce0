"""The token-adaptive divergences against their formulas over the whole vocabulary, and what each docstring claims."""
# N tokens, B buckets

import math

import pytest
import torch

from opsd.ops.losses.divergences import DIVERGENCES, forward_kl, reverse_kl
from opsd.ops.signals import hellinger
from tests.oracle import dense_divergence

NAMES = ("todi", "akl", "abkd", "entropy_aware")


def random_logits(seed, num_tokens=50, num_buckets=9):
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(num_tokens, num_buckets, generator=generator, dtype=torch.float64)


def logprobs(*probs):
    return torch.tensor([probs], dtype=torch.float64).log()


def with_rest(logits, num_named):
    """[N, V] -> [N, num_named + 1]: the first tokens keep a bucket of their own."""
    found = logits.log_softmax(1)
    return torch.cat([found[:, :num_named], found[:, num_named:].logsumexp(1, keepdim=True)], dim=1)


@pytest.mark.parametrize("num_named", [2, 8])
def test_todi_is_forward_plus_reverse_kl_on_the_same_buckets(num_named):
    student, teacher = (with_rest(random_logits(seed), num_named) for seed in (0, 1))
    both = forward_kl(student, teacher) + reverse_kl(student, teacher)
    torch.testing.assert_close(DIVERGENCES["todi"](student, teacher), both)


def test_todis_gradient_is_the_slope_of_its_sum_at_frozen_weights():
    """Central differences over softmax probabilities; the derivative of the value itself is another."""
    student, teacher = random_logits(0, num_tokens=1), random_logits(1, num_tokens=1).softmax(1)
    share = teacher / (teacher + student.softmax(1))

    def frozen(logits):
        probs = logits.softmax(1)
        return (share * teacher * (teacher / probs).log() + (1 - share) * probs * (probs / teacher).log()).sum().item()

    slopes = []
    for step in 1e-5 * torch.eye(9, dtype=torch.float64):
        slopes.append((frozen(student + step) - frozen(student - step)) / 2e-5)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(DIVERGENCES["todi"](student.log_softmax(1), teacher.log()).sum(), student)
    torch.testing.assert_close(grad[0], torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    jeffreys = dense_divergence("forward_kl", student, teacher.log()) + dense_divergence(
        "reverse_kl", student, teacher.log()
    )
    assert (torch.autograd.grad(jeffreys.sum(), student)[0] - grad).abs().max() > 0.01


def test_akl_worked_out_by_hand():
    """Ascending teacher 0.1, 0.3, 0.6: cumulative 0.1, 0.4, 1.0, so only the last bucket is head."""
    student, teacher = logprobs(0.5, 0.3, 0.2), logprobs(0.3, 0.6, 0.1)
    head, tail = 0.3, 0.2 + 0.1
    forward, reverse = forward_kl(student, teacher).item(), reverse_kl(student, teacher).item()
    expected = (head * forward + tail * reverse) / (head + tail)
    assert DIVERGENCES["akl"](student, teacher).item() == pytest.approx(expected)
    # With a head of 0.65 the tail holds 0.35 at most: the bucket of 0.3 crosses that and joins the head.
    expected = ((0.3 + 0.2) * forward + 0.1 * reverse) / 0.6
    assert DIVERGENCES["akl"](student, teacher, head_mass=0.65).item() == pytest.approx(expected)


def test_akls_crossing_bucket_may_be_tail_as_in_the_authors_code():
    """Descending teacher 0.4, 0.35, 0.15, 0.1: the second crosses a half; a first bucket of 0.7 is head in any case."""
    student, teacher = logprobs(0.1, 0.2, 0.3, 0.4), logprobs(0.35, 0.1, 0.4, 0.15)
    forward, reverse = forward_kl(student, teacher).item(), reverse_kl(student, teacher).item()
    gaps = {"second": 0.25, "last": 0.1, "first": 0.1, "third": 0.25}
    head, tail = gaps["first"], gaps["second"] + gaps["third"] + gaps["last"]
    expected = (head * forward + tail * reverse) / (head + tail)
    assert DIVERGENCES["akl"](student, teacher, crossing="tail").item() == pytest.approx(expected)
    head, tail = head + gaps["second"], tail - gaps["second"]
    expected = (head * forward + tail * reverse) / (head + tail)
    assert DIVERGENCES["akl"](student, teacher).item() == pytest.approx(expected)
    teacher = logprobs(0.7, 0.1, 0.1, 0.1)
    same = [DIVERGENCES["akl"](student, teacher, crossing=side) for side in ("head", "tail")]
    torch.testing.assert_close(*same)


def akl_of_the_authors(student, teacher, mu=0.5):
    """wutaiqiang/LLM_KD_AKL, AKL.py, said anew."""
    descending, order = teacher.sort(dim=-1, descending=True)
    is_tail = descending.cumsum(-1) > mu
    is_tail[..., 0] = False
    error = (descending - student.detach().gather(-1, order)).abs()
    head, tail = (error * ~is_tail).sum(-1), (error * is_tail).sum(-1)
    forward = (teacher * (teacher.log() - student.log())).sum(-1)
    reverse = (student * (student.log() - teacher.log())).sum(-1)
    return (head * forward + tail * reverse) / (head + tail)


@pytest.mark.parametrize("head_mass", [0.5, 0.3])
def test_akl_with_the_crossing_bucket_in_the_tail_is_the_authors(head_mass):
    logits, teacher = random_logits(3).requires_grad_(), random_logits(4).log_softmax(1)
    ours = DIVERGENCES["akl"](logits.log_softmax(1), teacher, head_mass=head_mass, crossing="tail")
    theirs = akl_of_the_authors(logits.softmax(1), teacher.exp(), mu=head_mass)
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(value.sum(), logits)[0] for value in (ours, theirs))
    torch.testing.assert_close(found, expected)
    dense = dense_divergence("akl", logits.detach(), teacher, head_mass=head_mass, crossing="tail")
    torch.testing.assert_close(ours.detach(), dense)
    assert (DIVERGENCES["akl"](logits.log_softmax(1), teacher, head_mass=head_mass) - ours).abs().max() > 1e-3


def test_akls_weights_are_constants_in_the_gradient():
    student, teacher = random_logits(0, num_tokens=1).requires_grad_(), random_logits(1, num_tokens=1)
    parts = [dense_divergence(name, student, teacher) for name in ("forward_kl", "reverse_kl")]
    value = DIVERGENCES["akl"](student.log_softmax(1), teacher.log_softmax(1))
    head_share = ((value - parts[1]) / (parts[0] - parts[1])).detach()
    assert 0.0 < head_share < 1.0
    (grad,) = torch.autograd.grad(value.sum(), student, retain_graph=True)
    (expected,) = torch.autograd.grad((head_share * parts[0] + (1 - head_share) * parts[1]).sum(), student)
    torch.testing.assert_close(grad, expected)


def test_abkd_in_its_special_cases():
    student, teacher = (random_logits(seed).log_softmax(1) for seed in (0, 1))
    abkd = DIVERGENCES["abkd"]
    torch.testing.assert_close(abkd(student, teacher, alpha=0.5, beta=0.5), 4 * hellinger(student, teacher) ** 2)
    squares = (student.exp() - teacher.exp()).square().sum(1) / 2
    torch.testing.assert_close(abkd(student, teacher, alpha=1.0, beta=1.0), squares)
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(abkd(student, teacher, alpha=1.0, beta=1e-6), forward_kl(student, teacher), **near)
    torch.testing.assert_close(abkd(student, teacher, alpha=1e-6, beta=1.0), reverse_kl(student, teacher), **near)


def test_abkd_on_summed_masses_may_exceed_the_dense_value():
    """Two tokens, each 0.1 below the teacher: 0.2 squared is more than twice 0.1 squared."""
    student, teacher = logprobs(0.2, 0.2, 0.6), logprobs(0.3, 0.3, 0.4)
    coarse = [torch.stack([part[:, :2].logsumexp(1), part[:, 2]], dim=1) for part in (student, teacher)]
    options = {"alpha": 1.0, "beta": 1.0}
    assert DIVERGENCES["abkd"](*coarse, **options) > DIVERGENCES["abkd"](student, teacher, **options)


def test_the_forward_kl_joins_in_above_the_teachers_entropy_threshold():
    student = logprobs(0.2, 0.5, 0.3).repeat(2, 1)
    teacher = torch.cat([logprobs(0.4, 0.4, 0.2), logprobs(0.8, 0.1, 0.1)])  # entropies 1.055 and 0.639 nats
    reverse, forward = reverse_kl(student, teacher), forward_kl(student, teacher)
    torch.testing.assert_close(DIVERGENCES["entropy_aware"](student, teacher), reverse + forward * torch.tensor([1, 0]))
    torch.testing.assert_close(DIVERGENCES["entropy_aware"](student, teacher, threshold=0.6), reverse + forward)
    torch.testing.assert_close(DIVERGENCES["entropy_aware"](student, teacher, threshold=1.1), reverse)


@pytest.mark.parametrize("name", ["abkd", "entropy_aware"])
def test_gradcheck(name):
    student, teacher = random_logits(0, 4, 5).requires_grad_(), random_logits(1, 4, 5).log_softmax(1)
    assert torch.autograd.gradcheck(lambda logits: DIVERGENCES[name](logits.log_softmax(1), teacher), student)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_students_dtype_comes_out_also_with_a_float32_teacher(name, dtype):
    student, teacher = random_logits(0).log_softmax(1), random_logits(1).log_softmax(1)
    value = DIVERGENCES[name](student.to(dtype), teacher.float())
    assert value.dtype == dtype
    torch.testing.assert_close(value.double(), DIVERGENCES[name](student, teacher), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_equal_models_have_no_loss_and_no_gradient(name):
    student = random_logits(0)
    student[:, 3] = -math.inf
    teacher = student.log_softmax(1)
    value = DIVERGENCES[name](student.requires_grad_().log_softmax(1), teacher)
    assert value.abs().max() < 1e-12
    assert torch.autograd.grad(value.sum(), student)[0].abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "student", "teacher", "expected"),
    [
        ("todi", [0.0, 1.0], [0.5, 0.5], math.inf),
        ("todi", [0.5, 0.5], [0.0, 1.0], math.inf),
        ("akl", [0.0, 1.0], [0.5, 0.5], math.inf),
        ("akl", [0.5, 0.5], [0.0, 1.0], math.inf),
        ("abkd", [0.0, 1.0], [1.0, 0.0], (0.2 / 0.9 + 0.7 / 0.9) / 0.14),
        ("entropy_aware", [0.5, 0.5], [0.0, 1.0], math.inf),
        ("entropy_aware", [0.0, 1.0], [0.5, 0.5], math.log(2.0)),  # an entropy of 0.69: the forward KL stays out
    ],
)
def test_mass_on_one_side_only(name, student, teacher, expected):
    assert DIVERGENCES[name](logprobs(*student), logprobs(*teacher)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("abkd", {"alpha": 0.0}, r"alpha and beta must be > 0, got 0.0 and 0.7; .* forward_kl and reverse_kl"),
        ("abkd", {"beta": 0.0}, "alpha and beta must be > 0"),
        ("abkd", {"alpha": 0.7, "beta": -0.7}, "alpha and beta must be > 0"),
        ("abkd", {"alpha": math.nan}, "alpha and beta must be > 0"),
        ("akl", {"head_mass": 0.0}, r"head_mass must be in \(0, 1\), got 0.0"),
        ("akl", {"head_mass": 1.0}, "head_mass"),
        ("akl", {"crossing": "middle"}, "crossing must be one of head, tail, got 'middle'"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        DIVERGENCES[name](logprobs(0.5, 0.5), logprobs(0.4, 0.6), **options)
