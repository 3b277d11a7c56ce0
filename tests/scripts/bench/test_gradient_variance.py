"""The closed forms against every draw of a small vocabulary, each draw's gradient by autograd through the real head."""
# V events, D width

import pytest
import torch

from bench_variance import named_by
from gradient_variance import ESTIMATORS, Row, noise_of
from opsd.ops.head.loss import sparse_head_loss
from opsd.ops.losses.divergences import reverse_kl
from opsd.ops.losses.residual import residual_reverse_kl
from opsd.types import ScoredRollout, Vocabulary
from tests.opsd.builders import make_scored, merge_stops, random_logprobs
from tests.opsd.ops.head.reference import dense_events

VOCAB, WIDTH = 7, 3


def make_row(seed, stop_ids, named):
    generator = torch.Generator().manual_seed(seed)
    hidden_D = torch.randn(WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    columns_VD = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    options = {"stop_ids": stop_ids} if stop_ids else {}
    teacher_V = dense_events(2.0 * torch.randn(1, VOCAB, generator=generator, dtype=torch.float64), options)[0]
    logits_V = columns_VD @ hidden_D
    in_support_V = torch.zeros(VOCAB, dtype=torch.bool)
    in_support_V[list(named)] = True
    row = Row(
        student_V=dense_events(logits_V[None], options)[0].detach().log(),
        teacher_V=teacher_V.log(),
        in_support_V=in_support_V,
        columns_VD=columns_VD,
        stop_ids=stop_ids,
        stop_shares=logits_V[list(stop_ids)].softmax(0).detach() if stop_ids else None,
    )
    return row, hidden_D, options


def drawn_gradient(name, event, row, hidden_D, options):
    """Of one draw, [D]."""
    student_V = dense_events((row.columns_VD @ hidden_D)[None], options)[0]
    teacher_V = row.teacher_V.exp()
    if name == "sampled":
        loss = (student_V[event] / teacher_V[event]).log().detach() * student_V[event].log()
    elif name == "exact":
        possible = student_V.detach() > 0
        loss = (student_V[possible] * (student_V[possible] / teacher_V[possible]).log()).sum()
    else:
        named = row.in_support_V.nonzero()[:, 0].tolist()
        slots = [event, *(other for other in named if other != event)]
        rest, tail = (1.0 - teacher_V[ids].sum() for ids in (slots, named))
        buckets = torch.cat([teacher_V[slots], rest[None]]).log()[None]
        inputs = {"outside_N": torch.tensor([event not in named]), "teacher_tail_N": tail.log()[None]}
        arguments = (hidden_D[None], row.columns_VD, torch.tensor([slots]), buckets, torch.ones(1, dtype=torch.float64))
        if name == "coarse":
            loss, _ = sparse_head_loss(*arguments, reverse_kl, **options)
        else:
            loss, _ = sparse_head_loss(*arguments, residual_reverse_kl, row_inputs=inputs, **options)
    return torch.autograd.grad(loss, hidden_D)[0]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("stop_ids", [(), (1, 4)], ids=["plain", "stops"])
@pytest.mark.parametrize("seed", range(3))
def test_mean_and_covariance_are_those_over_every_draw(name, stop_ids, seed):
    row, hidden_D, options = make_row(seed, stop_ids, named=(1, 3))
    events = row.student_V.isfinite().nonzero()[:, 0].tolist()
    draw_V = row.student_V[events].exp()
    gradient_VD = torch.stack([drawn_gradient(name, event, row, hidden_D, options) for event in events])
    mean_D = draw_V @ gradient_VD
    trace = (draw_V * (gradient_VD - mean_D).square().sum(1)).sum()
    found = noise_of(row)[name]
    torch.testing.assert_close(found.mean_D, mean_D, rtol=1e-9, atol=1e-10)
    assert found.trace == pytest.approx(trace.item(), rel=1e-9, abs=1e-10)


def test_the_residual_is_unbiased_and_the_less_noisy_the_more_is_named():
    traces = []
    for number in (0, 2, 4, 6):
        total = {name: 0.0 for name in ESTIMATORS}
        for seed in range(8):
            row, _, _ = make_row(seed, (), named=())
            likeliest = row.student_V.topk(number).indices
            in_support_V = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, likeliest, True)
            noise = noise_of(row._replace(in_support_V=in_support_V))
            for name in ("residual", "sampled"):
                torch.testing.assert_close(noise[name].mean_D, noise["exact"].mean_D)
            assert abs(noise["exact"].trace) < 1e-12
            assert number == 6 or (noise["coarse"].mean_D - noise["exact"].mean_D).norm() > 1e-4
            total = {name: total[name] + noise[name].trace for name in ESTIMATORS}
        traces.append(total["residual"] / total["sampled"])
    assert 1.0 > traces[1] > traces[2] > traces[3]


def test_a_support_of_every_event_leaves_no_noise():
    row, _, _ = make_row(1, (), named=range(VOCAB))
    noise = noise_of(row)
    for name in ("coarse", "residual"):
        assert noise[name].trace == pytest.approx(0.0, abs=1e-12)
        torch.testing.assert_close(noise[name].mean_D, noise["exact"].mean_D)


def test_the_support_is_that_of_the_lists():
    vocabulary = Vocabulary(size=20, stop_ids=(3, 7))
    student, teacher = (merge_stops(random_logprobs(4, 20, seed), vocabulary) for seed in (0, 1))
    rollout, scores = make_scored(student, teacher, [1, 7, 5, 3], num_candidates=5, top_k=6, vocabulary=vocabulary)
    item = ScoredRollout(rollout=rollout, scores=scores)
    for support, width in (("teacher", 6), ("union", None)):
        named_TV = named_by(item, support, vocabulary, torch.device("cpu"))
        for place, named_V in enumerate(named_TV):
            expected = set(scores.top_ids[place].tolist())
            if support == "union":
                expected |= set(rollout.candidate_ids[place].tolist())
            assert set(named_V.nonzero()[:, 0].tolist()) == expected
            assert width is None or len(expected) == width
