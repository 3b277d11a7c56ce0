"""Whole runs of the tiny pair (the fixture `pair`), and what they leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.command_line import command_line

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 6
TRANSFORMERS = ("rollout.backend=transformers", "teacher.backend=transformers")  # vLLM takes longest to start


def arguments(pair, output_dir, *overrides):
    settings = {
        "student.path": pair / "student",
        "teacher.path": pair / "teacher",
        "data.train_path": pair / "prompts.jsonl",
        "data.eval_path": pair / "prompts.jsonl",
        "output_dir": output_dir,
        "num_steps": NUM_STEPS,
        "data.prompts_per_step": 12,
        "rollout.max_response_tokens": 12,
        "rollout.num_candidates": 8,
        "rollout.group_size": 3,
        "teacher.top_k": 8,
        "learner.learning_rate": 1e-3,
        "learner.micro_batch_tokens": 64,
        "eval.num_problems": 0,
        "eval.num_kl_prompts": 8,
        "log.wandb": "off",
        "log.dashboard": "false",
    }
    return [*(f"{name}={value}" for name, value in settings.items()), *overrides]


def train(pair, output_dir, *overrides, program="tip.train"):
    """One run, whose driver is this process."""
    return command_line(program, arguments(pair, output_dir, *overrides))


def train_as_a_user(pair, output_dir, *overrides, program="tip.train"):
    """One run in a process of its own, which may be sent signals; returns the finished process."""
    command = [sys.executable, "-m", program, *arguments(pair, output_dir, *overrides)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def finished(pair, output_dir, *overrides, program="tip.train"):
    run = train(pair, output_dir, *overrides, program=program)
    assert run.returncode == 0, run.stderr[-4000:]
    return output_dir


def training_lines(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(output_dir):
    return [line["loss"] for line in training_lines(output_dir)]


def weights(output_dir):
    return load_file(output_dir / "student" / "model.safetensors")
