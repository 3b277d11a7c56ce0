"""The head's branch for CUDA, run on the CPU: values, gradients, and nothing that would make the host wait."""
# N rows, D width, V vocabulary, U support size, B = U + 1 buckets

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsd.ops.head import whole_rows
from opsd.ops.head.chunks import row_chunks
from opsd.ops.head.form import HeadForm
from opsd.ops.head.gradients import add_product_, linear, product
from opsd.ops.head.loss import bucket_logprobs, sparse_head_loss
from opsd.ops.head.plan import PLANS, plan_for
from opsd.ops.losses.divergences import DIVERGENCES, forward_kl, reverse_kl
from tests.opsd.ops.head.largest_tensor import LargestTensor
from tests.opsd.ops.head.reference import (
    EVERY_HEAD,
    assert_near,
    dense_buckets,
    gradients,
    head_options,
    known_of,
    make_head,
    make_support,
    tempered_teacher,
)

CUDA = PLANS["cuda"]


@pytest.fixture(autouse=True)
def small_sums(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(whole_rows, "SUM_COLUMNS", 5)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "todi"])
@EVERY_HEAD
@pytest.mark.parametrize("chunk_rows", [2, 7])
def test_the_loss_has_value_and_gradient_of_the_coarse_divergence(name, head, chunk_rows):
    hidden, weight, teacher = make_head()
    options = head_options(head, 7)
    support = make_support(7, 4, options)
    support[4] = -1  # a row that names nothing
    teacher_logprobs = known_of(teacher, support, options)
    token_weight = torch.rand(7)
    arguments = (hidden, weight, support, teacher_logprobs, token_weight, DIVERGENCES[name])
    loss, per_token = sparse_head_loss(*arguments, chunk_rows=chunk_rows, plan=CUDA, **options)
    logits = hidden.double() @ weight.double().T
    student_logprobs, _ = dense_buckets(logits, support, options)
    coarse = DIVERGENCES[name](student_logprobs, tempered_teacher(teacher_logprobs, logits, support, options))
    assert_near(per_token, coarse, 1e-5)
    expected = gradients((token_weight * coarse).sum(), hidden, weight)
    on_cpu, _ = sparse_head_loss(*arguments, chunk_rows=chunk_rows, **options)
    for actual, by_blocks, wanted in zip(
        gradients(loss, hidden, weight), gradients(on_cpu, hidden, weight), expected, strict=True
    ):
        assert_near(actual, wanted, 1e-5)
        assert_near(actual, by_blocks, 1e-5)


@EVERY_HEAD
def test_buckets_and_entropy_equal_a_dense_computation(head):
    hidden, weight, _ = make_head()
    options = head_options(head, 7)
    support = make_support(7, 4, options)
    support[4] = -1  # the entropy of its rest knows whether a token has been taken out
    results = bucket_logprobs(hidden, weight, support, chunk_rows=3, plan=CUDA, **options)
    dense = dense_buckets(hidden.double() @ weight.double().T, support, options)
    for actual, expected in zip(results, dense, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
    upstream = torch.rand(results[0].shape), torch.rand(7)
    actual = torch.autograd.grad(results, (hidden, weight), upstream)
    expected = torch.autograd.grad(dense, (hidden, weight), tuple(grad.double() for grad in upstream))
    for left, right in zip(actual, expected, strict=True):
        assert_near(left, right.double(), 1e-5)


@pytest.mark.parametrize("num_named", [0, 13, 14])
def test_a_support_may_name_everything_or_nothing(num_named):
    hidden, weight, teacher = make_head(dtype=torch.float64)
    options = {"stop_ids": (9, 2, 11)}
    allowed = torch.tensor([v for v in range(16) if v not in (2, 11)])
    support = torch.stack([allowed[torch.randperm(14)[:num_named]] for _ in range(7)])
    support[::2, num_named // 2 :] = -1
    teacher_logprobs = known_of(teacher, support, options)
    results = []
    for plan in (PLANS["cpu"], CUDA):
        arguments = (hidden, weight, support, teacher_logprobs, torch.rand(7, generator=torch.Generator()), forward_kl)
        loss, per_token = sparse_head_loss(*arguments, plan=plan, chunk_rows=4, **options)
        results.append((per_token, *gradients(loss, hidden, weight)))
    assert all(value.isfinite().all() for value in results[1])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_row_is_seen(value):
    hidden, weight, teacher = make_head()
    with torch.no_grad():
        hidden[3, 0] = value
    support = make_support(7, 4)
    arguments = (support, dense_buckets(teacher, support)[0].float(), torch.ones(7), reverse_kl)
    loss, per_token = sparse_head_loss(hidden, weight, *arguments, plan=CUDA)
    assert not loss.isfinite() and per_token.isfinite().sum() == 6
    assert not gradients(loss, hidden, weight)[1].isfinite().all()


def test_the_filter_works_where_it_is_asked_for():
    hidden, weight, teacher = make_head(num_rows=20, vocab=200, dtype=torch.float64)
    support = make_support(20, 4, {"vocab_size": 200})
    arguments = (hidden, weight, support, dense_buckets(teacher, support)[0], torch.ones(20), reverse_kl)
    results = {}
    for plan in (CUDA, PLANS["cpu"]._replace(block_columns=200)):
        for threshold in (None, 1e-2):
            loss, _ = sparse_head_loss(*arguments, plan=plan, chunk_rows=3, filter_threshold=threshold)
            results[plan, threshold] = gradients(loss, hidden, weight)
    torch.testing.assert_close(results[CUDA, 1e-2], results[plan, 1e-2])
    assert not torch.allclose(results[CUDA, 1e-2][0], results[CUDA, None][0])


class Waits(TorchDispatchMode):
    """Operations inside whose result the host would have to read from the device, or whose size depends on values."""

    NAMES = (
        "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim",
        "unique_consecutive", "repeat_interleave", "equal", "allclose", "bincount", "_to_cpu",
    )  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        leaves = tree_leaves((args, kwargs))
        by_mask = name.startswith(("index", "_index")) and any(
            torch.is_tensor(leaf) and leaf.dtype in (torch.bool, torch.uint8) for leaf in leaves[1:]
        )
        # A tensor made of Python numbers is copied from the host's memory.
        if name in self.NAMES or by_mask or name == "lift_fresh":
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def run_step(plan, divergence=reverse_kl, dtype=torch.float32, **options):
    """One step of the loss and of the statistics; what each host read was."""
    hidden, weight, teacher = make_head(dtype=dtype)
    support = make_support(7, 4, options)
    teacher_logprobs = known_of(teacher, support, options).float()
    token_weight = torch.ones(7)
    with Waits() as waits:
        arguments = (hidden, weight, support, teacher_logprobs, token_weight, divergence)
        loss, _ = sparse_head_loss(*arguments, chunk_rows=2, plan=plan, **options)
        (2.0 * loss).backward() if plan is CUDA else loss.sum()
        logprobs, entropy = bucket_logprobs(hidden, weight, support, chunk_rows=3, plan=plan, **options)
        (logprobs[:, 0] + entropy).sum().backward()
    return waits.found


@EVERY_HEAD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_waits_for_nothing(head, dtype):
    # The first gradients are scaled by the host's choice on the CPU only, so that line reads its scalar here.
    found = run_step(CUDA, dtype=dtype, **head_options(head, 7))
    assert found.count("is_nonzero") + found.count("_local_scalar_dense") <= 1
    assert set(found) <= {"is_nonzero", "_local_scalar_dense"}


@EVERY_HEAD
def test_a_bias_a_scale_and_a_cap_do_not_make_the_host_wait(head):
    found = run_step(
        CUDA,
        bias_V=torch.ones(16),
        form=HeadForm(scale=0.5, soft_cap=3.0),
        dtype=torch.bfloat16,
        **head_options(head, 7),
    )
    assert set(found) <= {"is_nonzero", "_local_scalar_dense"} and len(found) <= 1


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_no_divergence_makes_the_host_wait(name):
    assert len(run_step(CUDA, DIVERGENCES[name])) <= 1


def test_the_branch_of_the_cpu_does_wait_so_the_count_counts():
    found = run_step(PLANS["cpu"], stop_ids=(2, 9))
    assert len(found) > 10


def test_tensors_without_values_go_all_the_way():
    """On the meta device a value cannot be read, nor a size depend on one."""
    hidden, weight, _ = (tensor.detach().to("meta").requires_grad_() for tensor in make_head(dtype=torch.bfloat16))
    support = torch.empty(7, 3, dtype=torch.int64, device="meta")
    teacher_logprobs, ones = torch.empty(7, 4, device="meta"), torch.ones(7, device="meta")
    options = {"temperature_N": ones, "vocab_size": 14, "stop_ids": (3, 8), "chunk_rows": 2, "plan": CUDA}
    sparse_head_loss(hidden, weight, support, teacher_logprobs, ones, reverse_kl, **options)[0].backward()
    bucket_logprobs(hidden, weight, support, **options)[1].sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_on_cuda_products_of_16_bit_factors_sum_in_float32(monkeypatch):
    """Seen by shape and dtype alone: no kernel is run."""
    added = []
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: added.append((args, options)))
    with FakeTensorMode():
        left, right = (torch.empty(4, 4, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        total = torch.empty(4, 4, device="cuda")
        assert plan_for(left) is CUDA
        assert product(left, right).dtype == linear(left, right).dtype == torch.float32
        assert product(left, right, out=total) is total
        assert product(left.float(), right.float()).dtype == torch.float32
        add_product_(total, left, right, empty=True)
        assert not added
        add_product_(total, left, right, empty=False)
    (((total_given, *factors), options),) = added
    assert total_given is options["out"] is total and options["out_dtype"] == torch.float32
    assert [factor.dtype for factor in factors] == [torch.bfloat16] * 2


def test_chunks_take_gibibytes_and_are_equally_full():
    head = torch.empty(151_936, 1, device="meta", requires_grad=True)
    chunks = row_chunks(16_384, head, 151_936, CUDA)
    sizes = [rows.stop - rows.start for rows in chunks]
    assert sum(sizes) == 16_384 and len(sizes) == 4 and max(sizes) - min(sizes) <= 4
    assert max(sizes) * 151_936 * 4 <= CUDA.chunk_bytes
    assert 4096 <= CUDA.chunk_bytes // (4 * 151_936) <= 8192


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 1), (torch.bfloat16, 1)])
def test_a_chunk_has_one_buffer_of_rows_times_vocabulary_in_float32(dtype, copies):
    """The gradient takes the shares' place, or is a second buffer of half their size."""
    hidden, weight, teacher = make_head(num_rows=60, vocab=400, width=2, dtype=dtype)
    support = make_support(60, 4, {"vocab_size": 400})
    teacher_logprobs = dense_buckets(teacher, support)[0].float()
    with LargestTensor() as largest, Large(20 * 400) as large:
        arguments = (support, teacher_logprobs, torch.ones(60), reverse_kl)
        sparse_head_loss(hidden, weight, *arguments, chunk_rows=20, plan=CUDA)
    assert largest.numel == 20 * 400
    assert large.dtypes.count(torch.float32) <= copies
    assert large.dtypes.count(torch.bfloat16) == (0 if dtype == torch.float32 else 3)


class Large(TorchDispatchMode):
    """dtypes of the tensors of `numel` elements that `empty` made inside."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.dtypes = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if torch.is_tensor(result) and result.numel() == self.numel and "empty" in func.overloadpacket.__name__:
            self.dtypes.append(result.dtype)
        return result
