"""What gpu_check.py runs, in order of importance: how each part is called, at the sizes of a device."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

RATIOS = (1.0, 0.5, 0.2, 0.1)
HEAD_METHODS = {
    "exact": "exact",
    "sparse": "sparse",
    "dense": "dense, teacher's logits given",
    "compiled": "dense, compiled",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    function: str  # module:function
    options: dict[str, Any]
    is_check: bool = False  # it must hold, or the exit code is 1
    num_gpus: int = 1
    missing: str = ""  # what it needs and this machine lacks: then it is skipped by name


def parts(device: str) -> list[Part]:
    machine = Part(name="machine", function="gpu_machine:facts", options={"device": device})
    if device == "cpu":
        return [machine, *checks("cpu"), *speed_on_cpu()]
    return [machine, *checks("cuda"), *speed_on_cuda(), *engines()]


def checks(device: str) -> list[Part]:
    large = device == "cuda"
    head = dict(rows=512, vocab=151_936, width=256, named=64) if large else dict(rows=40, vocab=300, width=32, named=8)
    both = {**{name: size for name, size in head.items() if name != "named"}, "teacher_width": 384 if large else 48}
    # The CPU multiplies bfloat16 into bfloat16 only, which is no product to hold to float32.
    exact_in = "bfloat16" if large else "float32"
    dtypes = ("float32", "bfloat16")
    wanted = [
        *((f"head, {dtype}", "gpu_head:head", {"dtype": dtype, **head}) for dtype in dtypes),
        *((f"exact head, {dtype}", "gpu_exact:exact_head", {"dtype": dtype, **both}) for dtype in dtypes),
        (f"head at logits of 20, {exact_in}", "gpu_head:head_exactness", {"dtype": exact_in, **head}),
        *((f"packed attention, {dtype}", "gpu_training:packed_attention", {"dtype": dtype}) for dtype in dtypes),
        *((f"training step, {dtype}", "gpu_training:training_step", {"dtype": dtype}) for dtype in dtypes),
    ]
    return [
        Part(name=name, function=function, options={"device": device, **options}, is_check=True)
        for name, function, options in wanted
    ]


def speed_on_cuda() -> list[Part]:
    on = {"device": "cuda", "dtype": "bfloat16"}
    peak = {"size": 8192, "repeats": 5}
    head = {**on, "vocab": 151_936, "top_k": 64, "repeats": 5, "peak": peak}
    step = {**on, "prompt_tokens": 128, "response_tokens": 1920, "top_k": 64, "repeats": 2}
    large, small = "Qwen3-4B", "Qwen3-1.7B"
    return [
        peak_part(on, peak),
        *head_parts(head, 4096, 2560),
        *pass_checks(),
        *pass_parts("cuda", (4096, 1024), blocks=(1024, 4096, 16_384), vocab=151_936, named=64, repeats=10),
        *head_parts(head, 16_384, 2560),
        *step_parts(step, large, 8192, checkpointing=True),
        *step_parts(step, small, 8192, checkpointing=True),
        *step_parts(step, small, 8192, checkpointing=False),
        *head_parts(head, 4096, 4096),
        *head_parts(head, 16_384, 4096),
        *step_parts(step, small, 16_384, checkpointing=False),
        *step_parts(step, small, 16_384, checkpointing=True),
        *step_parts(step, large, 16_384, checkpointing=True),
        *step_parts(step, large, 8192, checkpointing=False),
        *step_parts(step, large, 16_384, checkpointing=False),
    ]


def speed_on_cpu() -> list[Part]:
    """Every part once, too small for its figures to mean anything. torch.compile would take longer than all of it."""
    on = {"device": "cpu", "dtype": "float32"}
    peak = {"size": 128, "repeats": 1}
    head = {**on, "vocab": 500, "top_k": 8, "repeats": 1, "peak": peak}
    step = {**on, "prompt_tokens": 4, "response_tokens": 28, "top_k": 8, "repeats": 1}
    return [
        peak_part(on, peak),
        *head_parts(head, 64, 16, ("exact", "sparse", "dense")),
        *pass_parts("cpu", (64,), vocab=500, named=8, repeats=1),
        *step_parts(step, "tiny", 128, checkpointing=True),
        *step_parts(step, "tiny", 128, checkpointing=False),
    ]


def peak_part(on: dict[str, Any], peak: dict[str, int]) -> Part:
    return Part(name="matmul peak", function="gpu_speed:matmul_peak", options={**on, **peak})


def head_parts(options: dict[str, Any], rows: int, width: int, names: tuple[str, ...] = (*HEAD_METHODS,)) -> list[Part]:
    return [
        Part(
            name=f"head speed, {name}, N {rows:,}, D {width:,}",
            function="gpu_speed:head_speed",
            options={**options, "method": HEAD_METHODS[name], "rows": rows, "width": width},
        )
        for name in names
    ]


def pass_checks() -> list[Part]:
    """The candidate's; no run uses it, so they are not among the first."""
    size = dict(rows=512, vocab=151_936, named=64, block=4096)
    return [
        Part(
            name=f"head's passes in Triton, {dtype}",
            function="gpu_passes:triton_passes",
            options={"device": "cuda", "dtype": dtype, **size},
            is_check=True,
            missing=lacking("triton", "Triton"),
        )
        for dtype in ("float32", "bfloat16")
    ]


def pass_parts(device: str, num_rows: tuple[int, ...], blocks: tuple[int, ...] = (), **options: int) -> list[Part]:
    """torch's passes, and the candidate's with so many columns at a time."""
    on = {"device": device, "dtype": "bfloat16"}
    return [
        Part(
            name=f"head's passes, {'torch' if block is None else f'Triton in blocks of {block:,}'}, N {rows:,}",
            function="gpu_passes:passes_speed",
            options={**on, **options, "rows": rows, "block": block},
            missing="" if block is None else lacking("triton", "Triton"),
        )
        for rows in num_rows
        for block in (None, *blocks)
    ]


def step_parts(options: dict[str, Any], model: str, tokens: int, *, checkpointing: bool) -> list[Part]:
    return [
        Part(
            name=f"step, {model}, {tokens:,} tokens, checkpointing {'on' if checkpointing else 'off'}, {ratio:g} kept",
            function="gpu_speed:step_speed",
            options={**options, "model": model, "tokens": tokens, "ratio": ratio, "checkpointing": checkpointing},
        )
        for ratio in RATIOS
    ]


def lacking(package: str, name: str) -> str:
    return "" if find_spec(package) else f"{name} is not installed"


def engines() -> list[Part]:
    missing, no_ray = lacking("vllm", "vLLM"), lacking("ray", "Ray")
    wanted = [
        ("vLLM, tensor parallelism", "tensor_parallel", 2, missing),
        ("vLLM, sleep and wake", "sleep_and_wake", 1, missing),
        ("vLLM, weights over NCCL", "nccl_transfer", 2, missing or no_ray),
    ]
    return [
        Part(
            name=name,
            function=f"gpu_engines:{function}",
            options={"device": "cuda"},
            is_check=True,
            num_gpus=num_gpus,
            missing=lacks,
        )
        for name, function, num_gpus, lacks in wanted
    ]
