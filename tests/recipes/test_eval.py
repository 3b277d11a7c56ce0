"""recipes/eval.sh: its environment variables become settings, its mistakes one line. It loads no model here."""

import json

import pytest

from tests.recipes.recipe import start, start_here
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and a folder of data of which two files are for evaluation."""
    root = tmp_path_factory.mktemp("a folder with spaces")
    make_tiny_qwen3(root / "model", tied=True, seed=0, eos_token_id=0)
    make_char_tokenizer(root / "model", eos_token_id=0)
    (root / "data").mkdir()
    for name, rows in (("val_a", 3), ("val_b", 2), ("train", 9)):
        lines = [json.dumps({"prompt": "1+1=", "answer": "2"})] * rows
        (root / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    return root


def evaluate(folder, *settings, **variables):
    """Started from `folder`, so that paths are relative to it."""
    return start_here("eval.sh", *settings, cwd=folder, **variables)


def test_the_plan_names_every_model_and_counts_the_answers(folder):
    process = evaluate(
        folder, "seed=3", PLAN_ONLY="1", MODEL_PATH="model", MODEL_NAME="mine", TEACHER_MODEL_PATH="model",
        DATA_DIR="data", VAL_N=4, MAX_RESPONSE_LENGTH=100,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in process.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["teacher", "mine"]
    assert [row[5:] for row in rows] == [["5", "20", "2,000"]] * 2
    assert not (folder / "outputs").exists()


@pytest.mark.slow
def test_a_plan_needs_no_model_no_data_and_no_network(folder):
    """In a process of its own, as a user starts it."""
    process = start("eval.sh", cwd=folder, PLAN_ONLY=1)
    assert process.returncode == 0, process.stderr
    assert "Qwen/Qwen3-8B | 8,190.7 M |" in process.stdout and "Qwen/Qwen3-4B | 4,022.5 M |" in process.stdout
    process = evaluate(folder, "max_response_tokens=50000", PLAN_ONLY=1)
    assert process.returncode == 2
    assert process.stderr.startswith("error: max_response_tokens=50000 leaves no room for a prompt in models.teacher")


def test_upstreams_variables_become_settings(folder):
    process = evaluate(
        folder, "--cfg", "job", MODEL_PATH="model", EVAL_DATA="data/val_a.jsonl,data/val_b.jsonl",
        VAL_TEMPERATURE="0.6", VAL_TOP_P="0.8", VAL_TOP_K="20", TP_SIZE="2", GPU_MEMORY_UTIL="0.5",
        MAX_PROMPT_LENGTH="99", REWARD_FUNCTION="math_dapo", OUTPUT_ROOT="out", RUN_ID="x",
        ENABLE_THINKING="False", DEVICE="cpu",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    for line in (
        "temperature: 0.6", "top_p: 0.8", "top_k: 20", "samples_per_problem: 16", f"output_dir: {folder}/out/x",
        "  grader: answer_line", "  max_prompt_tokens: 99", "  tensor_parallel_size: 2",
        "  gpu_memory_utilization: 0.5", "    enable_thinking: false", "device: cpu",
        f"  student: {folder}/model", f"  - {folder}/data/val_b.jsonl",
    ):  # fmt: skip
        assert line in process.stdout.splitlines()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "set MODEL_PATH"),
        ({"MODEL_PATH": "model"}, "set DATA_DIR or EVAL_DATA"),
        (
            {"MODEL_PATH": "nowhere", "DATA_DIR": "data", "DEVICE": "cpu"},
            "models.student=nowhere: there is no model here",
        ),
        ({"MODEL_PATH": "model", "DATA_DIR": "model"}, "model has no val_*"),
        ({"MODEL_PATH": "model", "DATA_DIR": "data", "REWARD_FUNCTION": "x"}, "REWARD_FUNCTION must be"),
        (
            {"MODEL_PATH": "model", "DATA_DIR": "data", "VAL_TOP_P": "7", "PLAN_ONLY": "1"},
            "top_p must be in (0, 1]",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, variables, said):
    process = evaluate(folder, **variables)
    assert process.returncode != 0
    assert said in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1
