"""Two real steps of every recipe, with tiny models in its environment variables."""

import json
import math
import string

import pytest

from scripts.ablation.records import read
from tests.recipes.recipe import DISTILLING, start
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

pytestmark = pytest.mark.slow
VOCAB_SIZE = len(string.printable) + 1


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A pair whose tokenizer knows every character and has a chat template, and prompts with worked solutions."""
    root = tmp_path_factory.mktemp("recipes")
    for name, layers, seed in (("teacher", 3, 1), ("student", 2, 2)):
        make_tiny_qwen3(
            root / name, vocab_size=VOCAB_SIZE, tied=True, layers=layers, seed=seed, eos_token_id=0, scale=2.0
        )
        make_char_tokenizer(root / name, vocab_size=VOCAB_SIZE, eos_token_id=0, alphabet=string.printable)
        (root / name / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    rows = [
        {"prompt": f"What is {a} + 1?", "answer": str(a + 1), "solution": f"{a} and 1 make {a + 1}."} for a in range(6)
    ]
    for split in ("train", "test"):
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"MODEL_PATH": root / "student", "TEACHER_MODEL_PATH": root / "teacher", "DATA_DIR": root}


SMALLER = [
    "learner.num_workers=1", "rollout.num_workers=1", "teacher.num_workers=1", "teacher.tensor_parallel_size=1",
    "eval.num_problems=2", "eval.num_kl_prompts=2", "log.wandb=off", "log.dashboard=false",
]  # fmt: skip
VARIABLES = {"TRAIN_BATCH_SIZE": 2, "ROLLOUT_N": 2, "MAX_RESPONSE_LENGTH": 12, "TOTAL_TRAINING_STEPS": 2}


def two_steps(recipe, places, output_root):
    """Lines of the run's metrics. What is larger than a laptop is set smaller; all else is the recipe's."""
    if recipe == "opsd_self_distill.sh":
        places = {name: path for name, path in places.items() if name != "TEACHER_MODEL_PATH"}
    process = start(
        recipe, *SMALLER, **places, **VARIABLES, DEVICE="cpu", OUTPUT_ROOT=output_root, RUN_ID="run", timeout=900
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [json.loads(line) for line in (output_root / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def check(recipe, places, output_root):
    steps = two_steps(recipe, places, output_root)
    assert len(steps) == 2 and all(math.isfinite(line["loss"]) for line in steps)
    assert (output_root / "run" / "student" / "config.json").is_file()


def test_the_papers_recipe_runs(places, tmp_path):
    check("qwen3_8b_to_4b.sh", places, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("recipe", [name for name in DISTILLING if name != "qwen3_8b_to_4b.sh"])
def test_every_other_recipe_runs(recipe, places, tmp_path):
    check(recipe, places, tmp_path)


@pytest.mark.long
def test_arms_are_compared_on_a_papers_recipe(places, tmp_path):
    arms = "--arms", "all", "q3@0.2", "--seeds", "0", "--settings", *SMALLER
    here = {**places, **VARIABLES, "DEVICE": "cpu", "DTYPE": "float32", "OUT": tmp_path}
    process = start("ablation_gpu.sh", *arms, **here, timeout=1800)
    assert process.returncode == 0, process.stderr[-3000:]
    for line in read(tmp_path):
        first, last = line["evaluations"]
        assert (first["step"], last["step"]) == (0, 2) and len(line["losses"]) == 2
        assert len(last["samples"]) == 6  # problems
    assert "| `q3@0.2` |" in (tmp_path / "RESULTS.md").read_text()
