"""Head, attention and training step on a GPU: are they right, how fast are they, how much memory do they take?

    bash scripts/gpu_check.sh                  writes recipes/results/gpu.json and gpu.md
    bash scripts/gpu_check.sh --device cpu     the same parts at tiny sizes, to see that they run

Parts run in order of importance until the time is up; both files are written anew after each. A part that fails is
recorded and the others continue. The exit code is 1 where a check failed, or was not done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import Part, parts
from gpu_table import report
from gpu_worker import PartsWorker

ROOT = Path(__file__).resolve().parents[2]
LEAST_S = 3.0  # a part is not begun with less


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    deadline = time.monotonic() + args.seconds
    done: dict[str, dict[str, Any]] = {}
    worker = PartsWorker()
    try:
        for part in (part for part in parts(args.device) if part.name == "machine" or args.only in part.name):
            done[part.name] = outcome = run(worker, part, done, deadline)
            write(args.out, args.device, done)
            said = outcome.get("error", "")
            print(f"{outcome['status']:8} {outcome['seconds']:6.1f} s  {part.name}  {said}", flush=True)
    finally:
        worker.close()
    return int(any(outcome["must_hold"] and outcome["status"] != "passed" for outcome in done.values()))


def run(worker: PartsWorker, part: Part, done: dict[str, dict[str, Any]], deadline: float) -> dict[str, Any]:
    left_s = deadline - time.monotonic()
    num_gpus = done.get("machine", {}).get("result", {}).get("num_gpus", part.num_gpus)
    lacks = part.missing or ("" if part.num_gpus <= max(1, num_gpus) else f"needs {part.num_gpus} GPUs")
    if lacks:
        return {"status": "skipped", "error": lacks, "seconds": 0.0, "must_hold": False}
    if left_s < LEAST_S:
        return {"status": "skipped", "error": "no time left", "seconds": 0.0, "must_hold": part.is_check}
    outcome = worker.run(part, left_s)
    return {**outcome, "must_hold": part.is_check, "options": part.options}


def write(folder: Path, device: str, done: dict[str, dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.json").write_text(json.dumps({"device": device, "parts": done}, indent=1) + "\n")
    (folder / "gpu.md").write_text(report(device, done))


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: recipes/results, on the CPU outputs/gpu_check"
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything; what is left is skipped by name")
    parser.add_argument("--only", default="", metavar="TEXT", help="parts whose name holds this, such as head or vLLM")
    args = parser.parse_args(argv)
    args.out = args.out or ROOT / ("recipes/results" if args.device == "cuda" else "outputs/gpu_check")
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
