"""The parts of gpu_check.py as Markdown."""

from __future__ import annotations

import math
from typing import Any

from opsd.evaluation.table import markdown_table

Done = dict[str, dict[str, Any]]
PAPER_GB = {1.0: 72.0, 0.5: 38.1, 0.2: 35.5, 0.1: 35.3}  # TIP, arXiv 2604.14084: Qwen3-8B to 4B, by the kept ratio


def report(device: str, done: Done) -> str:
    command = "bash scripts/gpu_check.sh" + (" --device cpu" if device == "cpu" else "")
    sections = [
        "# The learner's parts on one GPU" if device == "cuda" else "# The learner's parts at tiny sizes on a CPU",
        f"    {command}",
        ", ".join(f"{name} {value}" for name, value in done.get("machine", {}).get("result", {}).items()),
        checks(done),
        head_speed(done),
        passes_speed(done),
        step_speed(done),
        not_done(done),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def checks(done: Done) -> str:
    """A line for each part: its checks, and the one that comes nearest to what is allowed, or goes furthest beyond."""
    rows = []
    for name, outcome in done.items():
        found = outcome.get("result", []) if outcome["must_hold"] else []
        if found:
            worst = max(found, key=nearness)
            figures = [f"{worst['error']:.1e}", f"{worst['allowed']:.1e}"]
            holding = sum(check["passed"] for check in found)
            verdict = f"{holding} of {len(found)}"
            rows.append([name, verdict if holding == len(found) else f"**{verdict}**", worst["what"], *figures])
    note = "Every check, with its error and what is allowed, is in gpu.json; here the nearest to its bound."
    return section("Correctness", ["part", "hold", "nearest", "error", "allowed"], rows, note)


def nearness(check: dict[str, Any]) -> float:
    if not check["passed"]:
        return math.inf
    return check["error"] / check["allowed"] if check["allowed"] else 0.0


def head_speed(done: Done) -> str:
    rows = []
    for outcome in measured(done, "head speed"):
        options, result = outcome["options"], outcome["result"]
        rows.append([
            options["method"], f"{options['rows']:,}", f"{options['width']:,}", f"{result['ms']:.1f}",
            f"{result['tflops']:.3g}", f"{result['share_of_peak']:.0%}", f"{result['peak_gb']:.2f}",
        ])  # fmt: skip
    peak = done.get("matmul peak", {}).get("result")
    note = f"The matmul peak, measured here: {peak['tflops']:.3g} TFLOP/s. " if peak else ""
    note += (
        "TFLOP/s count the three products that any way needs (6 N V D), and not that of the teacher's head, which is a "
        "fourth of `exact`. Peak: above the inputs, gradients included."
    )
    header = ["way to loss and gradients", "N", "D", "ms", "TFLOP/s", "of the peak", "peak GB"]
    return section("The head", header, rows, note)


def passes_speed(done: Done) -> str:
    outcomes = measured(done, "head's passes, ")
    rows = []
    for outcome in outcomes:
        options, result = outcome["options"], outcome["result"]
        torchs = next((o["result"] for o in outcomes if o["options"] == {**options, "block": None}), None)
        rows.append([
            "torch" if options["block"] is None else f"Triton, {options['block']:,} columns at a time",
            f"{options['rows']:,}", f"{options['vocab']:,}", f"{result['forward_ms']:.2f}",
            f"{result['backward_ms']:.2f}", f"{sum(result.values()) / sum(torchs.values()):.2f}" if torchs else "",
        ])  # fmt: skip
    note = (
        "From logits in float32 to the buckets' log-probabilities, and from their gradient to dL/dlogits in bfloat16. "
        "The passes in Triton are a candidate: runs use torch's."
    )
    header = ["element-wise passes", "N", "V", "forward ms", "backward ms", "both, of torch's"]
    return section("The head's element-wise passes", header, rows, note)


def step_speed(done: Done) -> str:
    outcomes = measured(done, "step, ")
    rows = []
    for outcome in outcomes:
        options, result = outcome["options"], outcome["result"]
        whole = next((o["result"]["peak_gb"] for o in outcomes if same_but_ratio(o["options"], options)), None)
        paper = PAPER_GB[options["ratio"]]
        rows.append([
            options["model"], f"{options['tokens']:,}", "on" if options["checkpointing"] else "off",
            f"{options['ratio']:g}", f"{result['seconds']:.2f}", f"{result['tokens_per_s']:,.0f}",
            f"{result['peak_gb']:.1f}", f"{result['weights_and_moments_gb']:.1f}",
            f"{result['peak_gb'] / whole:.2f}" if whole else "", f"{paper:.1f}", f"{paper / PAPER_GB[1.0]:.2f}",
        ])  # fmt: skip
    header = [
        "shape", "packed tokens", "checkpointing", "kept", "s", "tokens/s", "peak GB", "weights and moments GB",
        "peak of kept 1", "the paper's GB", "of its kept 1",
    ]  # fmt: skip
    note = (
        "Random weights, one GPU, FSDP2 with one rank: float32 weights and AdamW moments stay on it. The paper's "
        "figures (Qwen3-8B to 4B) are of its own set-up: compare their course over the ratios, not their size."
    )
    return section("A training step", header, rows, note)


def same_but_ratio(options: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether `options` are those of `other` with every token kept."""
    return options == {**other, "ratio": 1.0}


def not_done(done: Done) -> str:
    lines = [f"- {name}: {outcome['error']}" for name, outcome in done.items() if "error" in outcome]
    return "## Failed or skipped\n\n" + "\n".join(lines) if lines else ""


def measured(done: Done, start: str) -> list[dict[str, Any]]:
    return [o for name, o in done.items() if name.startswith(start) and o["status"] == "measured"]


def section(title: str, header: list[str], rows: list[list[str]], note: str = "") -> str:
    if not rows:
        return ""
    return "\n\n".join(filter(None, [f"## {title}", note, markdown_table(header, rows)]))
