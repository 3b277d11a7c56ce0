"""recipes/eval.sh: its environment variables become settings, its mistakes one line. It loads no model here."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder in which the recipe finds itself, a finished set-up, this Python, a model and data."""
    root = tmp_path_factory.mktemp("checkout with a space")
    for folder in ("recipes", "scripts", ".venv/bin"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "recipes" / "eval.sh", root / "recipes")
    script(root / "scripts" / "setup.sh", "exit 0")
    script(root / ".venv" / "bin" / "python", f'PYTHONPATH={ROOT} exec {sys.executable} "$@"')
    make_tiny_qwen3(root / "model", tied=True, seed=0, eos_token_id=0)
    make_char_tokenizer(root / "model", eos_token_id=0)
    tokenizer = json.loads((root / "model" / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{{ messages[0].content }}{% if enable_thinking %}#{% endif %}"
    (root / "model" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (root / "data").mkdir()
    for name, rows in (("val_a", 3), ("val_b", 2), ("train", 9)):
        lines = [json.dumps({"prompt": "1+1=", "answer": "2"})] * rows
        (root / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return root


def script(path, body):
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def start(checkout, *overrides, **variables):
    """The finished process, as a user's call from the checkout's folder."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(checkout), "HF_HUB_OFFLINE": "1", **variables}
    command = ["bash", "recipes/eval.sh", *overrides]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)


def test_the_plan_names_every_model_and_counts_the_answers(checkout):
    process = start(
        checkout, "seed=3", PLAN_ONLY="1", MODEL_PATH="model", MODEL_NAME="mine", TEACHER_MODEL_PATH="model",
        DATA_DIR="data", VAL_N="4", MAX_RESPONSE_LENGTH="100", ENABLE_THINKING="true",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in process.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["teacher", "mine"]
    assert [row[4:] for row in rows] == [["5", "20", "2,000", "105"]] * 2  # a prompt of 5 tokens: the template's # too
    assert not (checkout / "outputs").exists()


def test_upstreams_variables_become_settings(checkout):
    process = start(
        checkout, "--cfg", "job", MODEL_PATH="model", EVAL_DATA="data/val_a.jsonl,data/val_b.jsonl",
        VAL_TEMPERATURE="0.6", VAL_TOP_P="0.8", VAL_TOP_K="20", TP_SIZE="2", GPU_MEMORY_UTIL="0.5",
        MAX_PROMPT_LENGTH="99", REWARD_FUNCTION="math_dapo", OUTPUT_ROOT="out", RUN_ID="x",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    for line in (
        "temperature: 0.6", "top_p: 0.8", "top_k: 20", "samples_per_problem: 16", "output_dir: out/evaluation-x",
        "  grader: answer_line", "  max_prompt_tokens: 99", "  tensor_parallel_size: 2",
        "  gpu_memory_utilization: 0.5", f"  student: {checkout}/model", f"  - {checkout}/data/val_b.jsonl",
    ):  # fmt: skip
        assert line in process.stdout.splitlines()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "set MODEL_PATH"),
        ({"MODEL_PATH": "model"}, "set DATA_DIR or EVAL_DATA"),
        ({"MODEL_PATH": "nowhere", "DATA_DIR": "data"}, "MODEL_PATH=nowhere: there is no such file or folder"),
        ({"MODEL_PATH": "model", "DATA_DIR": "model"}, "DATA_DIR=model has no val_*"),
        ({"MODEL_PATH": "model", "DATA_DIR": "data", "REWARD_FUNCTION": "x"}, "REWARD_FUNCTION must be"),
        (
            {"MODEL_PATH": "model", "DATA_DIR": "data", "VAL_TOP_P": "7", "PLAN_ONLY": "1"},
            "top_p must be in [0.0, 1.0]",
        ),
    ],
)
def test_a_mistake_is_one_line(checkout, variables, said):
    process = start(checkout, **variables)
    assert process.returncode != 0
    assert said in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
