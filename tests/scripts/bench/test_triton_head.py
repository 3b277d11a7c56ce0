"""The head's passes in Triton, run by its interpreter, against torch's and float64; and compiled for GPUs.

Triton is in no environment of this repository: CONTRIBUTING.md says how to run these tests.
"""
# N rows, V vocabulary, U support size, B = U + 1 buckets

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from opsd.ops.head.buffer import HeadBuffer
from opsd.ops.head.chunks import bucket_gradient, chunk_buckets, logit_gradient
from opsd.ops.head.events import Events
from opsd.ops.head.form import OutputHead
from opsd.ops.head.whole_rows import whole_buckets, whole_gradient
from opsd.ops.losses.divergences import forward_kl, reverse_kl
from tests.opsd.ops.head.reference import assert_near, dense_buckets, known_of

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":  # Triton reads it where it is imported, which may be long ago
    pytest.skip("needs TRITON_INTERPRET=1, see CONTRIBUTING.md", allow_module_level=True)

import gpu_passes  # noqa: E402
import triton_head  # noqa: E402

N, V = 8, 50
BLOCKS = pytest.mark.parametrize("block", [16, 64], ids=lambda block: f"block {block}")
EVENTS = pytest.mark.parametrize(
    "options",
    [{}, {"foreign_ids": (1, 7, 49)}, {"stop_ids": (2, 9, 11)}, {"stop_ids": (0, 49), "foreign_ids": (1, 30)}],
    ids=lambda options: "+".join(options) or "plain",
)
# What the kernels become on three kinds of GPU: whether a bfloat16 is rounded or cut off, and where threads wait.
COMPILE = """
import json, sys
import triton, triton_head
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
floats = dict.fromkeys(("logits_ptr", "named_ptr", "bucket_ptr", "max_ptr", "sum_ptr"), "*fp32")
types = {**floats, "support_ptr": "*i64", "vocab_size": "i32", "num_slots": "i32"}
found = []
for arch in (80, 90, 100):
    for grad in ("*bf16", "*fp32"):
        for kernel in (triton_head._take_named_and_reduce, triton_head._gradient_of_rest_and_named):
            signature = {name: {**types, "grad_ptr": grad}.get(name, "constexpr") for name in kernel.arg_names}
            source = ASTSource(kernel, signature, {"SLOTS": 64, "BLOCK": 4096})
            options = {"num_warps": triton_head.num_warps(4096)}
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            found.append([kernel.fn.__name__, grad, len(compiled.asm["cubin"]), compiled.asm["ptx"]])
json.dump(found, sys.stdout)
"""


def make_case(options, num_slots=6):
    """Logits [N, V], and events; the last slot of every second row is empty, and row 3 names nothing."""
    torch.manual_seed(0)
    logits = 4.0 * torch.randn(N, V)
    stop_ids = options.get("stop_ids", ())
    without = {*stop_ids[1:], *options.get("foreign_ids", ())}
    allowed = torch.tensor([v for v in range(V) if v not in without])
    support = torch.stack([allowed[torch.randperm(len(allowed))[: num_slots or len(allowed)]] for _ in range(N)])
    support[::2, -1:] = -1
    support[3] = -1
    if stop_ids:
        support[4, 0] = stop_ids[0]
        support[4, 1:][support[4, 1:] == stop_ids[0]] = -1
    return logits, Events(support, None, V, stop_ids, options.get("foreign_ids", ()))


def by_torch(branch, logits, events):
    """Of a branch of the product: log-probabilities, G (of random gradients), and dL/dlogits. Its head is 1."""
    head = OutputHead(torch.eye(V))
    buffer = HeadBuffer(head.weight_VD, vocab_size=V, dtype=torch.float32, needs_gradient=False, in_blocks=False)
    if branch == "whole rows":
        chunk = whole_buckets(logits, head, events, buffer)
    else:
        chunk = chunk_buckets(logits, head, events, buffer, block_columns=20)
    grad = bucket_gradient(chunk, torch.randn(chunk.logprobs_NB.shape, generator=torch.Generator().manual_seed(1)))
    if branch == "whole rows":
        [(_, gradient)] = whole_gradient(chunk, events, grad, None, dtype=torch.float32)
    else:
        blocks = []
        for columns, block in logit_gradient(chunk, events, grad, None):
            blocks.append(block.clone())
            buffer.gradient_of(columns)
        gradient = torch.cat(blocks, dim=1)
    return chunk.logprobs_NB, grad, gradient


@BLOCKS
@EVENTS
@pytest.mark.parametrize("num_slots", [6, None], ids=["few named", "all named"])
@pytest.mark.parametrize("branch", ["whole rows", "blocks of columns"])
def test_both_passes_are_those_of_the_product(branch, num_slots, options, block):
    logits, events = make_case(options, num_slots)
    logprobs, grad, gradient = by_torch(branch, logits, events)
    rows = triton_head.triton_buckets(logits.clone(), events, block=block)
    torch.testing.assert_close(rows.logprobs_NB, logprobs, rtol=1e-6, atol=1e-6)
    found = triton_head.triton_gradient(rows, events, grad, dtype=torch.float32, block=block)
    torch.testing.assert_close(found, gradient, rtol=1e-6, atol=1e-6)
    assert found.data_ptr() == rows.logits_NV.data_ptr()
    if num_slots is None:
        assert rows.logprobs_NB[1, -1] == -math.inf and rows.logprobs_NB[0, -1] > -math.inf


@EVENTS
@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
def test_a_loss_has_the_value_and_gradient_of_a_dense_one_in_float64(divergence, options):
    logits, events = make_case(options)
    stop_ids = {"stop_ids": events.stop_ids}
    dense = logits.double()
    dense[:, list(events.foreign_ids)] = -math.inf
    dense.requires_grad_()
    teacher = known_of(dense.detach() + torch.randn(N, V), events.support_NU, stop_ids)
    expected = divergence(dense_buckets(dense, events.support_NU, stop_ids)[0], teacher)
    (dense_gradient,) = torch.autograd.grad(expected.sum(), dense)
    rows = triton_head.triton_buckets(logits.clone(), events, block=16)
    logprobs = rows.logprobs_NB.clone().requires_grad_()
    value = divergence(logprobs, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(value.sum(), logprobs)
    grad = grad.masked_fill(logprobs == -math.inf, 0.0)
    grad = (grad - logprobs.exp() * grad.sum(1, keepdim=True)).detach().float()
    found = triton_head.triton_gradient(rows, events, grad, dtype=torch.float32, block=16)
    assert_near(found, dense_gradient, 1e-6)


def test_a_gradient_in_bfloat16_differs_by_no_more_than_the_interpreter_cuts_off():
    logits, events = make_case({"stop_ids": (2, 9, 11)})
    logprobs, grad, gradient = by_torch("whole rows", logits, events)
    rows = triton_head.triton_buckets(logits.clone(), events, block=16)
    found = triton_head.triton_gradient(rows, events, grad, dtype=torch.bfloat16, block=16)
    assert found.dtype == torch.bfloat16
    # A GPU rounds, see below; a stop id's part is of a number that was cut off before.
    torch.testing.assert_close(found.float(), gradient, rtol=2**-6, atol=0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [5, 20], ids=["named", "of the rest"])
def test_a_diverged_row_is_seen_and_leaves_the_others_alone(column, value):
    logits, events = make_case({})
    events.support_NU[5] = torch.arange(6)
    logits[5, column] = value
    rows = triton_head.triton_buckets(logits.clone(), events, block=16)
    is_finite = (rows.logprobs_NB.isfinite() | (events.support_NU < 0).any(1, keepdim=True)).all(1)
    assert is_finite.tolist() == [row != 5 for row in range(N)] and rows.logprobs_NB[5].isnan().any()
    grad = torch.where(rows.logprobs_NB == -math.inf, 0.0, rows.logprobs_NB).float()
    gradient = triton_head.triton_gradient(rows, events, grad, dtype=torch.bfloat16, block=16)
    assert gradient.isfinite().all(1).tolist() == [row != 5 for row in range(N)]


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(N, V, dtype=torch.float64), r"must be \(8, 50\) torch.float32, contiguous, got .*float64"),
        (torch.zeros(V, N).T, r"contiguous, got \(8, 50\) torch.float32, strides \(1, 8\)"),
        (torch.zeros(N, V + 1), r"must be \(8, 50\) .*got \(8, 51\)"),
    ],
    ids=["float64", "transposed", "with padding"],
)
def test_logits_that_the_kernels_would_misread_are_refused(logits, message):
    with pytest.raises(ValueError, match=message):
        triton_head.triton_buckets(logits, make_case({})[1])


def test_a_temperature_is_refused():
    logits, events = make_case({})
    with pytest.raises(ValueError, match="temperature_N must be None"):
        triton_head.triton_buckets(logits, events._replace(temperature_N=torch.ones(N)))


CHECK = dict(device="cpu", dtype="float32", rows=20, vocab=100, named=8, block=32)


def test_the_gpu_check_of_the_passes_holds():
    checks = gpu_passes.triton_passes(**CHECK)
    assert len(checks) == 6 and all(check.passed for check in checks)


@pytest.mark.parametrize(
    ("function", "wrong"),
    [
        ("divide_stops", {"gradient", "gradient, largest error"}),
        ("merge_stops", {"log-probabilities, nats", "gradient", "gradient, largest error"}),
    ],
)
def test_passes_that_leave_the_stop_ids_alone_are_found_wrong(monkeypatch, function, wrong):
    monkeypatch.setattr(triton_head, function, lambda *arguments: None)
    failing = {check.what for check in gpu_passes.triton_passes(**CHECK) if not check.passed}
    assert {what for what in failing if ":" not in what} == wrong


def test_each_pass_is_timed_on_the_same_logits():
    options = {key: value for key, value in CHECK.items() if key != "block"}
    for block in (None, 32):
        milliseconds = gpu_passes.passes_speed(**options, block=block, repeats=1)
        assert set(milliseconds) == {"forward_ms", "backward_ms"} and min(milliseconds.values()) > 0.0


def test_the_kernels_compile_for_gpus(tmp_path):
    """A process of its own, in which they are not the interpreter's; the wheel has an assembler."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    compiled = json.loads(process.stdout)
    assert len(compiled) == 12 and all(cubin_bytes > 0 for _, _, cubin_bytes, _ in compiled)
    for name, grad, _, ptx in compiled:
        before, of_loop = ptx.split("Inner Loop Header")
        loop, after = of_loop.split("bra", 1)
        assert "ld.global" in loop and "bar.sync" not in loop
        if name == "_take_named_and_reduce":  # the named logits are read, then overwritten, then the row is read
            assert before.count("bar.sync") == 2
        else:  # the named tokens' gradients are written after those of the rest
            assert after.count("bar.sync") == 1
            assert ("cvt.rn.bf16" in ptx) == (grad == "*bf16")
