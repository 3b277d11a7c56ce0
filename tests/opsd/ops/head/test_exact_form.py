"""The exact head where either head has a bias, a scale or a soft cap, against a dense float64 oracle."""

import pytest
import torch

from opsd.ops.head.exact import exact_head_loss
from opsd.ops.head.form import PLAIN, HeadForm
from opsd.ops.head.plan import PLANS
from opsd.ops.losses.divergences import DIVERGENCES, forward_kl, reverse_kl

V, PADDED, D, E, N = 23, 4, 5, 7, 6
STOP_IDS, FOREIGN_IDS = (2, 11, 17), (5,)
FORMS = [
    pytest.param(HeadForm(scale=0.5), PLAIN, False, id="a student's scale"),
    pytest.param(HeadForm(soft_cap=4.0), PLAIN, False, id="a student's cap"),
    pytest.param(PLAIN, HeadForm(scale=2.0, soft_cap=3.0), True, id="a teacher's all"),
    pytest.param(HeadForm(scale=-1.5, soft_cap=5.0), HeadForm(scale=0.7), True, id="all of both"),
]


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "hidden_ND": normal(N, D, scale=2.0),
        "weight_VD": normal(V + PADDED, D, scale=2.0),
        "bias_V": normal(V + PADDED),
        "teacher_hidden_NE": normal(N, E),
        "teacher_weight_WE": normal(V + 2, E),
        "teacher_bias_W": normal(V + 2),
        "weight_N": normal(N).abs(),
        "temperature_N": 0.5 + normal(N).abs(),
    }


def events(logits_NV, temperature_N):
    """Log-probabilities [N, V] of events; -inf at what is none."""
    logits_NV = logits_NV[:, :V].clone()
    merged_N = logits_NV[:, list(STOP_IDS)].logsumexp(1)
    outside = torch.zeros(V, dtype=torch.bool)
    outside[list((*STOP_IDS, *FOREIGN_IDS))] = True
    logits_NV = logits_NV.masked_fill(outside, -torch.inf)
    logits_NV = torch.cat([logits_NV[:, : STOP_IDS[0]], merged_N[:, None], logits_NV[:, STOP_IDS[0] + 1 :]], dim=1)
    return (logits_NV / temperature_N[:, None]).log_softmax(1)


def capped(product, form):
    logits = form.scale * product
    return logits if form.soft_cap is None else form.soft_cap * torch.tanh(logits / form.soft_cap)


def dense(t, divergence, form, teacher_form, has_bias):
    bias, teacher_bias = (t["bias_V"], t["teacher_bias_W"]) if has_bias else (0.0, 0.0)
    student = events(capped(t["hidden_ND"] @ t["weight_VD"].T + bias, form), t["temperature_N"])
    teacher = events(
        capped(t["teacher_hidden_NE"] @ t["teacher_weight_WE"].T + teacher_bias, teacher_form), t["temperature_N"]
    )
    return (t["weight_N"] * divergence(student, teacher)).sum()


def ours(t, divergence, form, teacher_form, has_bias, **how):
    names = ("hidden_ND", "weight_VD", "teacher_hidden_NE", "teacher_weight_WE", "weight_N")
    bias = {name: t[name] for name in ("bias_V", "teacher_bias_W")} if has_bias else {}
    loss, _ = exact_head_loss(
        *(t[name] for name in names), divergence, temperature_N=t["temperature_N"], vocab_size=V, stop_ids=STOP_IDS,
        foreign_ids=FOREIGN_IDS, form=form, teacher_form=teacher_form, **bias, **how,
    )  # fmt: skip
    return loss


def gradients(function, t, names):
    leaves = {name: t[name].clone().requires_grad_() for name in names}
    loss = function({**t, **leaves})
    return loss.detach(), torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize(("form", "teacher_form", "has_bias"), FORMS)
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "todi"])
def test_value_and_gradients_are_the_dense_ones(name, form, teacher_form, has_bias):
    t, divergence = tensors(), DIVERGENCES[name]
    learnt = ["hidden_ND", "weight_VD", *(["bias_V"] if has_bias else [])]
    rest = (divergence, form, teacher_form, has_bias)
    wanted = gradients(lambda values: dense(values, *rest), t, learnt)
    for how in ({}, {"chunk_rows": 1}, {"plan": PLANS["cpu"]._replace(block_columns=4)}, {"plan": PLANS["cuda"]}):
        loss, found = gradients(lambda values, how=how: ours(values, *rest, **how), t, learnt)
        torch.testing.assert_close(loss, wanted[0], atol=1e-10, rtol=1e-10)
        for one, other in zip(found, wanted[1], strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_in_float32_the_gradients_stay_within_a_ten_thousandth():
    form, teacher_form = HeadForm(scale=1.3, soft_cap=6.0), HeadForm(soft_cap=8.0)
    t = tensors(seed=3)
    t["temperature_N"] = torch.ones(N, dtype=torch.float64)
    learnt = ["hidden_ND", "weight_VD", "bias_V"]
    for divergence in (reverse_kl, forward_kl):
        _, wanted = gradients(lambda v, d=divergence: dense(v, d, form, teacher_form, True), t, learnt)
        single = {name: value.float() for name, value in t.items()}
        entry = DIVERGENCES[divergence.__name__]
        _, found = gradients(lambda v, d=entry: ours(v, d, form, teacher_form, True), single, learnt)
        for one, other in zip(found, wanted, strict=True):
            assert (one.double() - other).norm() <= 1e-4 * other.norm()


@pytest.mark.parametrize("form", [HeadForm(scale=0.0), HeadForm(soft_cap=-1.0)])
def test_a_form_that_makes_no_logits_is_refused(form):
    t = tensors()
    for own, other in ((form, PLAIN), (PLAIN, form)):
        with pytest.raises(ValueError, match=r"^form\."):
            ours(t, DIVERGENCES["reverse_kl"], own, other, False)
