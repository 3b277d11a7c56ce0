"""Random output heads, and what comes of them by plain dense computations in float64."""
# N rows, D width, V vocabulary, U support size, B = U + 1 buckets

import math

import pytest
import torch

from opsd.ops.head.form import PLAIN
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import reverse_kl

N, V, D = 12, 64, 6  # of a peaked head
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


def dense_logits(hidden, weight, options):
    """float64 [N, V], as a head with a bias, a scale and a soft cap makes them."""
    logits = hidden.double() @ weight.double().T
    if "bias_V" in options:
        logits = logits + options["bias_V"].double()
    form = options.get("form", PLAIN)
    logits = form.scale * logits
    return logits if form.soft_cap is None else form.soft_cap * torch.tanh(logits / form.soft_cap)


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


def peaked_head(sharpness=8.0, dtype=torch.float64):
    """hidden [N, D] and weight [V, D] whose rows each find a few tokens likely, and teacher logits [N, V]."""
    hidden = (sharpness * torch.randn(N, D, dtype=torch.float64)).to(dtype).requires_grad_()
    weight = torch.randn(V, D, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, 2.0 * torch.randn(N, V, dtype=torch.float64)


def loss_and_gradients(hidden, weight, teacher_logits, support, divergence=reverse_kl, **options):
    head = {key: value for key, value in options.items() if key in ("temperature_N", "vocab_size", "stop_ids")}
    teacher_logprobs = known_of(teacher_logits, support, head)
    token_weight = torch.linspace(0.5, 1.5, len(hidden), dtype=torch.float64)
    loss, _ = sparse_head_loss(hidden, weight, support, teacher_logprobs, token_weight, divergence, **options)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def logit_gradients(hidden, weight, teacher_logits, support, head):
    """dL/dlogits [N, V] by autograd through the dense float64 buckets."""
    logits = (hidden.double() @ weight.double().T).detach().requires_grad_()
    teacher_logprobs = tempered_teacher(known_of(teacher_logits, support, head), logits, support, head)
    value = reverse_kl(dense_buckets(logits, support, head)[0], teacher_logprobs)
    token_weight = torch.linspace(0.5, 1.5, len(hidden), dtype=torch.float64)
    return torch.autograd.grad((token_weight * value).sum(), logits)[0]
