"""Random heads of a student and a teacher, and their divergence over all tokens by plain dense float64."""
# N rows, D width of the student, E of the teacher, V rows of the student's head, W of the teacher's

from dataclasses import replace
from functools import partial

import torch

from opsd.ops.head.exact import exact_head_loss
from opsd.ops.losses.table import LOSSES
from tests.oracle import dense_divergence

N, V, W, D, E = 7, 23, 26, 5, 8


def make_pair(num_rows=N, vocab=V, teacher_vocab=W, width=D, teacher_width=E, dtype=torch.float32, seed=0, scale=1.0):
    """hidden [N, D] and weight [V, D] that require gradients, teacher_hidden [N, E] and teacher_weight [W, E]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (num_rows, width), (vocab, width), (num_rows, teacher_width), (teacher_vocab, teacher_width)
    pair = [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    hidden, weight, teacher_hidden, teacher_weight = (tensor.to(dtype) for tensor in pair)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight


def event_logits(hidden, weight, options):
    """Logits of the events alone, [N, number of events], in float64: no padding, no foreign id, one stop event."""
    logits = hidden.double() @ weight.double().T
    stop_ids = list(options.get("stop_ids", ()))
    left_out = {*stop_ids, *options.get("foreign_ids", ())}
    parts = [logits[:, [v for v in range(options.get("vocab_size", len(weight))) if v not in left_out]]]
    if stop_ids:
        parts.append(logits[:, stop_ids].logsumexp(1, keepdim=True))
    events = torch.cat(parts, dim=1)
    return events / options["temperature_N"].double()[:, None] if "temperature_N" in options else events


def dense(name, pair, options, **divergence_options):
    """The divergence of each row [N] from its definition, differentiable in the student's tensors."""
    hidden, weight, teacher_hidden, teacher_weight = pair
    student, teacher = event_logits(hidden, weight, options), event_logits(teacher_hidden, teacher_weight, options)
    return dense_divergence(name, student, teacher, **divergence_options)


def results(pair, divergence, **options):
    """Values of the rows, and both gradients of their sum weighted by `row_weights`."""
    loss, per_token = exact_head_loss(*pair, row_weights(len(pair[0])), divergence, **options)
    torch.testing.assert_close(loss.detach(), (row_weights(len(pair[0])) * per_token).sum(), equal_nan=True)
    return per_token, *torch.autograd.grad(loss, pair[:2])


def dense_results(name, pair, options, **divergence_options):
    """The same, exact: the student's tensors are converted to float64 before the gradient is taken."""
    exact = [tensor.detach().double() for tensor in pair]
    leaves = exact[0].requires_grad_(), exact[1].requires_grad_()
    value = dense(name, (*leaves, *exact[2:]), options, **divergence_options)
    grads = torch.autograd.grad((row_weights(len(value)) * value).sum(), leaves)
    return value.detach(), *grads


def row_weights(num_rows):
    return torch.linspace(0.5, 1.5, num_rows)


def by_name(name, **options):
    """The entry of that name with its options bound, as the configuration binds them."""
    return replace(LOSSES[name], function=partial(LOSSES[name].function, **options))
