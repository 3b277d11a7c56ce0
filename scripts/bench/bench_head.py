"""Time and memory of the output head with its loss and gradients, as ratios within one run.

    python scripts/bench/bench_head.py              the sparse loss against dense logits, on random rows
    python scripts/bench/bench_head.py --exact --teacher-width 1024     the exact loss, with a teacher's head of its own
    python scripts/bench/bench_head.py --model S --teacher T --prompts FILE    the gradient filter, on sampled rows

Every repeat runs all methods in turn; the median counts. On one CPU thread the clock is the process's CPU time, which
other processes on the machine disturb least, otherwise the wall's. Memory: the peak of a fresh process for each method,
above its inputs, less the gradients it returns. `--device cuda` has not been run by us.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from head_methods import Gradients, Method, method_of, sparse_method
from head_rows import random_rows, sampled_rows
from measure import PAGE, PeakMemory, clock, give_freed_memory_back, markdown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP_ROWS = 64  # enough for the products to go to the library that those of all rows go to


def time_methods(methods: dict[str, Method], device: str, repeats: int) -> dict[str, float]:
    """Median seconds of each; every method runs once before the clock does."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, method in methods.items():
            start = clock(device)
            method()
            if repeat > 0:
                seconds[name].append(clock(device) - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_gib(name: str, args: argparse.Namespace, num_rows: int) -> float:
    """Of one run of a method in a fresh process, beyond inputs and gradients."""
    fresh = {"mp_context": get_context("spawn"), "initializer": give_freed_memory_back}
    with ProcessPoolExecutor(max_workers=1, **fresh) as pool:
        return pool.submit(measure_peak_gib, name, args, num_rows).result()


def measure_peak_gib(name: str, args: argparse.Namespace, num_rows: int) -> float:
    rows = random_rows(num_rows, args.vocab, args.width, args.top_k).to(args.device, DTYPES[args.dtype])
    method_of(name, rows.first(WARM_UP_ROWS), args.teacher_width)()  # what libraries allocate once is not the method's
    method = method_of(name, rows, args.teacher_width)
    with PeakMemory(args.device) as peak:
        gradients = method()
    beyond = peak.bytes - sum(gradient.nbytes for gradient in gradients)
    return max(beyond, PAGE) / 2**30


def against_dense(args: argparse.Namespace) -> list[list[str]]:
    """The table on random rows; the dense way needs every token, the others those that are kept."""
    rows = random_rows(args.rows, args.vocab, args.width, args.top_k).to(args.device, DTYPES[args.dtype])
    ours = "exact" if args.exact else "sparse"
    runs = {("dense", args.rows): "all"}
    if not args.exact:
        runs["dense, teacher's logits given", args.rows] = "all"
    for ratio in args.ratios:
        runs[ours, int(ratio * args.rows)] = f"{ratio:g}"
    runs[f"{ours}, filter off", args.rows] = "1"
    if args.with_trl:
        runs["checkpointed top-K (TRL's way)", args.rows] = "1"
    methods = {f"{name} {n}": method_of(name, rows.first(n), args.teacher_width) for name, n in runs}
    seconds = time_methods(methods, args.device, args.repeats)
    del rows, methods
    memory_only = [(ours, n) for n in args.memory_rows]
    gib = {run: peak_gib(run[0], args, run[1]) for run in [*runs, *memory_only]}
    base_s, base_gib = seconds[f"dense {args.rows}"], gib["dense", args.rows]
    print(f"\nThe dense way: {base_s:.2f} s, {base_gib:.2f} GiB beyond inputs and gradients.\n")
    table = [["method", "kept", "rows", "times faster", "peak MiB", "of the dense peak"]]
    for (name, n), kept in [*runs.items(), *((run, "") for run in memory_only)]:
        faster = f"{base_s / seconds[f'{name} {n}']:.2f}" if kept else ""
        mib = gib[name, n] * 1024
        table.append([name, kept, str(n), faster, f"{mib:.0f}", f"1/{base_gib / gib[name, n]:.1f}"])
    return table


def filter_on_real_rows(args: argparse.Namespace) -> list[list[str]]:
    """The table on a student's rows: what the filter saves, and what it costs in exactness."""
    exact_rows = sampled_rows(args.model, args.teacher, args.prompts, args.rows, args.top_k, args.tokens)
    rows = exact_rows.to(args.device, DTYPES[args.dtype])
    table = [["divergence", "threshold", "time of filter off", "error of grad hidden", "error of grad weight"]]
    for divergence in args.divergences:
        # The reference starts from the rounded inputs: the error is the computation's, not that of storing them.
        exact = sparse_method(rows.to(args.device, torch.float64), divergence=divergence, filter_threshold=0.0)()
        thresholds = [0.0, None, *args.thresholds]
        make = functools.partial(sparse_method, rows, divergence=divergence)
        methods = {str(t): make(filter_threshold=t) for t in thresholds}
        seconds = time_methods(methods, args.device, args.repeats)
        for name, method in methods.items():
            errors = relative_errors(method(), exact)
            label = {"0.0": "off", "None": "the default"}.get(name, name)
            table.append([divergence, label, f"{seconds[name] / seconds['0.0']:.3f}", *(f"{e:.1e}" for e in errors)])
    return table


def relative_errors(actual: Gradients, exact: Gradients) -> list[float]:
    return [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, exact, strict=True)]


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--rows", type=int, default=1024, help="tokens of the batch")
    parser.add_argument("--top-k", type=int, default=64, help="tokens that the teacher names")
    parser.add_argument("--repeats", type=int, default=3)
    dense = parser.add_argument_group("random rows")
    dense.add_argument("--vocab", type=int, default=151_936)
    dense.add_argument("--width", type=int, default=512)
    dense.add_argument("--ratios", type=float, nargs="+", default=[1.0, 0.5, 0.2], help="shares of the tokens kept")
    dense.add_argument("--memory-rows", type=int, nargs="*", default=[8192], help="measure the peak at these too")
    dense.add_argument("--with-trl", action="store_true", help="add our equivalent of TRL's checkpointed top-K loss")
    dense.add_argument("--exact", action="store_true", help="the loss over the whole vocabulary, not the sparse one")
    dense.add_argument("--teacher-width", type=int, help="of the teacher's head; the student's where it is not given")
    real = parser.add_argument_group("a student's rows")
    real.add_argument("--model", type=Path, help="the student, a Hugging Face folder")
    real.add_argument("--teacher", type=Path)
    real.add_argument("--prompts", type=Path, help='JSON lines with "question" or "prompt"')
    real.add_argument("--tokens", type=int, default=96, help="longest answer that the student samples")
    real.add_argument("--divergences", nargs="+", default=["reverse_kl"])
    real.add_argument("--thresholds", type=float, nargs="*", default=[], help="beside off and the default")
    args = parser.parse_args(argv)
    given = [x is not None for x in (args.model, args.teacher, args.prompts)]
    if any(given) and not all(given):
        parser.error("--model, --teacher and --prompts belong together")
    return args


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    table = filter_on_real_rows(args) if args.model else against_dense(args)
    print(f"{args.dtype} on {args.device}, {torch.get_num_threads()} threads, median of {args.repeats}\n")
    print(markdown(table))


if __name__ == "__main__":
    main(sys.argv[1:])
