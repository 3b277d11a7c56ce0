"""Two steps of recipes/deepplanning.sh on made-up tasks: from the published folder to a student, with tiny models."""

import json
import math
import string

import pytest

from opsd.data.prepare import arguments, prepare
from tests.integration.runs import TRANSFORMERS, training_lines
from tests.opsd.data.deepplanning.world import publish
from tests.recipes.recipe import start, start_here
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

ALPHABET = string.printable + "¥"
TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools\n{% endif %}"
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}\n{% endfor %}"
)
SMALLER = [
    *TRANSFORMERS, "learner.num_workers=1", "rollout.num_workers=1", "teacher.num_workers=1",
    "teacher.tensor_parallel_size=1", "eval.num_problems=1", "eval.num_kl_prompts=1", "log.wandb=off",
    "log.dashboard=false",
]  # fmt: skip
VARIABLES = {
    "TRAIN_BATCH_SIZE": 2, "ROLLOUT_N": 2, "MAX_RESPONSE_LENGTH": 12, "TOTAL_TRAINING_STEPS": 2, "DEVICE": "cpu",
    "RUN_ID": "run",
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the prepared data, a teacher and a student."""
    root = tmp_path_factory.mktemp("deepplanning")
    folder = publish(root / "travelplanning")
    options = ["--train", f"deepplanning={folder}", "--train-ratio", "0.67", "--format", "jsonl"]
    facts = prepare(arguments().parse_args([str(root / "data"), *options]))
    assert "train.jsonl 2 rows, val_deepplanning.jsonl 1 rows" in facts
    for name, layers, seed in (("teacher", 3, 1), ("student", 2, 2)):
        size = len(ALPHABET) + 1
        path = root / name
        make_tiny_qwen3(path, vocab_size=size, tied=True, layers=layers, seed=seed, eos_token_id=0, scale=2.0)
        make_char_tokenizer(path, vocab_size=size, eos_token_id=0, alphabet=ALPHABET)
        (path / "chat_template.jinja").write_text(TEMPLATE)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    return root


@pytest.mark.slow
def test_the_recipe_runs_on_the_published_folder(root, tmp_path):
    named = {"MODEL_PATH": "student", "TEACHER_MODEL_PATH": "teacher", "DATA_DIR": "data"}
    places = {variable: root / name for variable, name in named.items()}
    process = start("deepplanning.sh", *SMALLER, **places, **VARIABLES, OUTPUT_ROOT=tmp_path, timeout=900)
    assert process.returncode == 0, process.stderr[-3000:]
    steps = training_lines(tmp_path / "run")
    assert len(steps) == 2 and all(math.isfinite(line["loss"]) for line in steps)
    assert (tmp_path / "run" / "student" / "config.json").is_file()


@pytest.mark.long  # tests/integration/test_evaluate_tools.py has an evaluation with tools
def test_avg_and_best_of_sampled_trajectories(root, tmp_path, joined):
    """With the command of docs/deepplanning.md."""
    process = start_here(
        "eval.sh", "data.grader=deepplanning", "tools.build=opsd.data.deepplanning.tools:build_tools",
        "+tools.options.max_answer_chars=4096", "tools.max_turns=50", "engine.backend=transformers", "dashboard=false",
        "latency_problems=0", MODEL_PATH=root / "student", DATA_DIR=root / "data", MAX_PROMPT_LENGTH=8192,
        MAX_RESPONSE_LENGTH=12, VAL_N=2, DEVICE="cpu", OUTPUT_ROOT=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    figures = json.loads((tmp_path / "evaluation" / "summary.json").read_text())["models"]["student"]["figures"]
    [of] = figures.values()
    assert of["problems"] == 1 and {"avg@2", "best@2", "part/delivered", "tools/turns"} <= of.keys()
    assert of["tools/trajectories"] == 2 and "| avg@2 | best@2 |" in process.stdout
