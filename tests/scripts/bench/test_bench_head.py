"""What bench_head.py compares: its baselines compute what they say. Nothing is timed here."""
# N rows, V vocabulary

import argparse
from pathlib import Path

import pytest
import torch

import bench_head
from head_methods import METHODS, checkpointed_top_k_method, dense_method, exact_method, sparse_method
from head_rows import Rows, random_rows
from opsd.ops.losses.divergences import DIVERGENCES


def rows_that_name_every_token(num_rows=300, vocab=24, width=5) -> Rows:
    rows = random_rows(num_rows, vocab, width, top_k=vocab)
    named = rows.teacher_logprobs_NB[:, :-1].log_softmax(1)
    rest = torch.full((num_rows, 1), -torch.inf)
    return Rows(
        hidden_ND=rows.hidden_ND,
        weight_VD=rows.weight_VD,
        support_NK=rows.support_NK,
        teacher_logprobs_NB=torch.cat([named, rest], dim=1),
    )


def test_with_every_token_named_the_top_k_baseline_has_the_gradients_of_the_sparse_loss():
    rows = rows_that_name_every_token()
    torch.testing.assert_close(checkpointed_top_k_method(rows)(), sparse_method(rows)())


@pytest.mark.parametrize("given", [True, False])
def test_the_dense_baseline_has_the_gradients_of_reverse_kl_to_its_teacher(given):
    rows = rows_that_name_every_token()
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(300, 24 if given else 5, generator=generator)
    teacher = (teacher if given else teacher @ torch.randn(24, 5, generator=generator).T).log_softmax(1)
    hidden, weight = rows.hidden_ND.clone().requires_grad_(), rows.weight_VD.clone().requires_grad_()
    DIVERGENCES["reverse_kl"]((hidden @ weight.T).log_softmax(1), teacher).mean().backward()
    torch.testing.assert_close(dense_method(rows, teacher_logits_given=given)(), (hidden.grad, weight.grad))


@pytest.mark.parametrize("teacher_width", [None, 9])
def test_the_exact_method_has_the_gradients_of_the_dense_baseline(teacher_width):
    rows = random_rows(300, vocab=24, width=5, top_k=4)
    found, expected = (method(rows, teacher_width=teacher_width)() for method in (exact_method, dense_method))
    torch.testing.assert_close(found, expected)


def test_a_method_that_keeps_a_large_tensor_shows_in_its_peak(monkeypatch):
    if not Path("/proc/self/statm").exists():
        pytest.skip("the memory of a process is read from Linux's /proc")

    def method(rows):
        held = 64 if len(rows.hidden_ND) > bench_head.WARM_UP_ROWS else 1
        return lambda: (torch.ones(held, 2**18).sum(0)[:1], rows.weight_VD[:1])

    monkeypatch.setitem(METHODS, "sparse", method)
    args = argparse.Namespace(vocab=24, width=5, top_k=4, device="cpu", dtype="float32", teacher_width=None)
    assert 60 < bench_head.measure_peak_gib("sparse", args, 2 * bench_head.WARM_UP_ROWS) * 1024 < 80
