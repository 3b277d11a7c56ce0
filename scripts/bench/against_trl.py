"""TRL's distillation trainer and this project on the same pair, prompts, batch, answer length and optimiser steps.

    pip install .[trl]
    python scripts/make_pair.py sums outputs/pair
    python scripts/bench/against_trl.py outputs/pair outputs/pair/train.jsonl outputs/pair/eval.jsonl

Both learn by the reverse KL of every token, with AdamW, the same peak learning rate, ten steps of warm-up, then a
cosine, and no weight decay. TRL is set as its documentation has it (`DistillationConfig`: beta 1, its own
sampling with transformers, gradient checkpointing) but for bf16, which it refuses on a CPU; its vLLM mode needs a GPU.
This project is plain on-policy distillation with its defaults: vLLM engines, one rank, a loss over the whole
vocabulary, as TRL's is; and the same with `loss.payload=logprobs`. Each uses the cores as it likes.

Seconds per step are the median over the steps after the fifth, start-up apart. Memory is the highest sum of what all
processes of a run hold (proportional set size, a shared page counted once). The held-out reverse KL is over the whole
vocabulary, on answers that the student samples to the held-out prompts, by transformers. After equal steps, the faster
of TRL and each of this project's two also runs as many steps as the other's time allows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench_setup import print_table

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 5  # steps at the start that are not timed
SEED = 1


@dataclass(frozen=True)
class Outcome:
    student: Path
    step_s: float
    start_s: float  # until the first step begins, and after the last
    peak_bytes: int


def run_trl(args: argparse.Namespace, steps: int, folder: Path) -> Outcome:
    job = folder / "job.json"
    folder.mkdir()
    job.write_text(
        json.dumps(
            {
                "student": f"{args.pair}/student",
                "teacher": f"{args.pair}/teacher",
                "prompts": args.prompts,
                "prompt_key": args.prompt_key,
                "chat_template": args.chat_template,
                "output": str(folder),
                "batch": args.batch,
                "steps": steps,
                "max_tokens": args.max_tokens,
                "learning_rate": args.learning_rate,
                "seed": SEED,
            }
        )
    )
    command = [sys.executable, str(ROOT / "scripts" / "bench" / "trl_run.py"), str(job)]
    wall_s, peak = watched(command, folder / "log")
    ends = json.loads((folder / "ends.json").read_text())
    return outcome(
        folder / "student", [later - earlier for earlier, later in itertools.pairwise(ends)], wall_s, steps, peak
    )


def run_ours(args: argparse.Namespace, steps: int, folder: Path, payload: str = "auto") -> Outcome:
    settings = {
        "output_dir": folder,
        "num_steps": steps,
        "seed": SEED,
        "student.path": f"{args.pair}/student",
        "teacher.path": f"{args.pair}/teacher",
        "teacher.top_k": args.top_k,
        "rollout.num_candidates": args.top_k,
        "data.train_path": args.prompts,
        "data.prompt_key": args.prompt_key,
        "data.chat_template": str(args.chat_template).lower(),
        "data.prompts_per_step": args.batch,
        "data.max_prompt_tokens": 512,
        "rollout.max_response_tokens": args.max_tokens,
        "learner.learning_rate": args.learning_rate,
        "learner.warmup_steps": 10,
        "learner.micro_batch_tokens": 4096,
        "loss.payload": payload,
        "schedule.max_staleness": args.max_staleness,
        **{f"{role}.cpu_threads": args.cpu_threads for role in ("rollout", "teacher", "learner")},
        "log.wandb": "off",
        "log.dashboard": "false",
    }
    command = [sys.executable, "-P", "-m", "opsd.train", *(f"{name}={value}" for name, value in settings.items())]
    wall_s, peak = watched(command, folder.with_name(folder.name + ".log"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    phases = ("rollout", "score", "select", "learn", "sync")
    seconds = [sum(line[f"phase_s/{name}"] for name in phases) for line in lines if "loss" in line]
    return outcome(folder / "student", seconds[1:], wall_s, steps, peak)


PROGRAMS = {
    "TRL": run_trl,
    "this project": run_ours,
    "this project, log-probabilities": partial(run_ours, payload="logprobs"),
}


def outcome(student: Path, seconds: list[float], wall_s: float, steps: int, peak: int) -> Outcome:
    step_s = statistics.median(seconds[SKIPPED - 1 :])
    return Outcome(student=student, step_s=step_s, start_s=max(0.0, wall_s - steps * step_s), peak_bytes=peak)


def watched(command: list[str], log: Path) -> tuple[float, int]:
    """(seconds, highest memory of it and all that it starts). Raises SystemExit where it fails."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("OMP_NUM_THREADS", None)
    began, peak, ended = time.perf_counter(), 0, threading.Event()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

        def watch() -> None:
            nonlocal peak
            while not ended.wait(1.0):
                peak = max(peak, tree_bytes(process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        code = process.wait()
        ended.set()
        watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command[:4])} ended with {code}:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - began, peak


def tree_bytes(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return total


@torch.no_grad()
def held_out_kl(student: Path, teacher: Path, texts: list[str], max_tokens: int) -> float:
    """Mean over the sampled tokens of KL(student || teacher), over the whole vocabulary, nats."""
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(student, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (student, teacher)]
    total, count = 0.0, 0
    for start in range(0, len(texts), 16):
        batch = tokenizer(
            texts[start : start + 16], return_tensors="pt", padding=True, add_special_tokens=False,
            return_token_type_ids=False,
        )  # fmt: skip
        ids_BL = models[0].generate(
            **batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        num_prompt = batch["input_ids"].shape[1]
        response_BT = ids_BL[:, num_prompt:]
        after_stop_BT = (response_BT == models[0].generation_config.eos_token_id).cumsum(1).roll(1, 1)
        after_stop_BT[:, 0] = 0
        mask_BL = torch.cat([batch["attention_mask"], torch.ones_like(response_BT)], dim=1)
        position_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        student_BTV, teacher_BTV = (
            model(ids_BL, attention_mask=mask_BL, position_ids=position_BL)
            .logits[:, num_prompt - 1 : -1]
            .log_softmax(-1)
            for model in models
        )
        size = min(student_BTV.shape[-1], teacher_BTV.shape[-1])
        student_BTV, teacher_BTV = student_BTV[..., :size], teacher_BTV[..., :size]
        kl_BT = (student_BTV.exp() * (student_BTV - teacher_BTV)).sum(-1)
        counted_BT = after_stop_BT == 0
        total, count = total + float(kl_BT[counted_BT].sum()), count + int(counted_BT.sum())
    return total / count


def texts_of(path: str, args: argparse.Namespace) -> list[str]:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()[: args.eval_prompts]]
    texts = [row[args.prompt_key] for row in rows]
    if not args.chat_template:
        return texts
    tokenizer = AutoTokenizer.from_pretrained(f"{args.pair}/student")
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", help="folder with student/ and teacher/")
    parser.add_argument("prompts", help="JSONL, one prompt a line")
    parser.add_argument("held_out", help="the same, of other prompts")
    parser.add_argument("--prompt-key", default="prompt")
    parser.add_argument("--chat-template", action="store_true")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=64, help="prompts of a step, an answer each")
    parser.add_argument("--max-tokens", type=int, default=48, help="of one answer")
    parser.add_argument("--top-k", type=int, default=8, help="of the teacher, and candidates of the student; TRL: all")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--max-staleness", type=int, default=0, help="of this project's answers")
    parser.add_argument("--cpu-threads", type=int, default=1, help="of each of this project's roles; TRL: all cores")
    parser.add_argument("--eval-prompts", type=int, default=256)
    parser.add_argument("--trainers", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    texts, teacher = texts_of(args.held_out, args), Path(args.pair) / "teacher"

    def kl(student: Path) -> float:
        return held_out_kl(student, teacher, texts, args.max_tokens)

    with tempfile.TemporaryDirectory() as parent:

        def run(name: str, steps: int) -> Outcome:
            return PROGRAMS[name](args, steps, Path(parent) / re.sub(r"\W+", "_", f"{name} {steps}"))

        outcomes = {name: run(name, args.steps) for name in args.trainers}
        rows = [["neither", "0", "", "", "", f"{kl(Path(args.pair) / 'student'):.4f}"]]
        for name, found in outcomes.items():
            rows.append(row_of(name, args.steps, found, kl(found.student)))
        for slow, fast in equal_times(outcomes):
            steps = round(args.steps * outcomes[slow].step_s / outcomes[fast].step_s)
            if steps > args.steps:
                found = run(fast, steps)
                rows.append(row_of(f"{fast}, as long as {slow}", steps, found, kl(found.student)))
        header = ["trainer", "steps", "s per step", "start and end, s", "peak memory, GiB", "held-out reverse KL, nats"]
        print_table(f"{args.batch} answers of at most {args.max_tokens} tokens a step", header, rows)


def equal_times(outcomes: dict[str, Outcome]) -> list[tuple[str, str]]:
    """(slower, faster) of TRL and each of the others."""
    pairs = [("TRL", name) for name in outcomes if name != "TRL"] if "TRL" in outcomes else []
    return [tuple(sorted(pair, key=lambda name: -outcomes[name].step_s)) for pair in pairs]


def row_of(name: str, steps: int, found: Outcome, kl: float) -> list[str]:
    peak = f"{found.peak_bytes / 2**30:.2f}"
    return [name, str(steps), f"{found.step_s:.3f}", f"{found.start_s:.0f}", peak, f"{kl:.4f}"]


if __name__ == "__main__":
    main()
