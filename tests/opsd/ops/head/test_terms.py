"""The closed forms of a divergence's terms are those of the divergence itself."""
# N rows, C columns

from functools import partial

import pytest
import torch

from opsd.ops.head.terms import CLOSED, NO_EVENT, by_autograd, terms_of
from opsd.ops.losses.divergences import DIVERGENCES, forward_kl, jsd, reverse_kl
from opsd.ops.losses.objective import Loss, Objective

N, C = 6, 40


def make_columns(dtype=torch.float64):
    """Log-probabilities of both models; the last column is no event, and the first row's are far apart."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3.0 * torch.randn(N, C, generator=generator, dtype=dtype) for _ in range(2))
    teacher[0] *= 30.0
    student[:, -1] = teacher[:, -1] = -torch.inf
    return tuple(logits.log_softmax(1).clamp_min(NO_EVENT) for logits in (student, teacher))


def logit_gradient(terms, columns, weight):
    """Values, and what becomes of the G that is left, whichever multiple of the probabilities is in it."""
    student, teacher = (logprobs.clone() for logprobs in columns)
    value = terms(student, teacher, weight)
    return value, student, teacher - student * teacher.sum(1, keepdim=True)


@pytest.mark.parametrize("function", CLOSED, ids=lambda function: function.__name__)
def test_a_closed_form_has_the_values_and_the_gradient_of_its_divergence(function):
    columns, weight = make_columns(), torch.linspace(0.0, 2.0, N)
    found = logit_gradient(CLOSED[function], columns, weight)
    torch.testing.assert_close(found, logit_gradient(partial(by_autograd, function), columns, weight))
    torch.testing.assert_close(found[0], function(*columns))
    torch.testing.assert_close(CLOSED[function](*columns, None), function(*columns))
    assert not found[2][:, -1].abs().gt(1e-30).any()


def test_a_value_without_weights_leaves_the_columns_as_they_are():
    columns = make_columns()
    before = [logprobs.clone() for logprobs in columns]
    for name in ("reverse_kl", "forward_kl", "jsd"):
        terms_of(Objective.of(DIVERGENCES[name]), {}, [{}])(*columns, None)
    assert all(torch.equal(*pair) for pair in zip(columns, before, strict=True))


@pytest.mark.parametrize("weight", [1.0, 0.25])
@pytest.mark.parametrize("function", [reverse_kl, partial(reverse_kl), forward_kl, partial(jsd, beta=0.2)])
def test_an_objective_has_its_value_whatever_computes_it(function, weight):
    columns = make_columns()
    objective = Objective(parts=((weight, Loss(function, by_token=True)),))
    terms = terms_of(objective, {}, [{}])
    torch.testing.assert_close(terms(*columns, None), weight * function(*columns))
    expected = partial(by_autograd, objective)
    one = torch.ones(N)
    torch.testing.assert_close(logit_gradient(terms, columns, one), logit_gradient(expected, columns, one))
    assert (terms in CLOSED.values()) == (weight == 1.0 and getattr(function, "func", function) is not jsd)
