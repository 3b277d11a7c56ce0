"""`python -m opsd.evaluate` with real engines on Ray: its figures against its own answers, and against greedy."""

import json

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.data.grading import GRADERS
from opsd.evaluation.results import read_results
from tests.command_line import command_line
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
QUESTIONS = ["1+2=", "3+4=", "(7-2)*2=", "9-8="]
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a run whose student it is, and two files of problems with what the model answers to some of them."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, tied, seed in (("model", False, 1), ("run/student", True, 2)):
        make_tiny_qwen3(root / name, tied=tied, seed=seed, eos_token_id=0, scale=2.0)
        make_char_tokenizer(root / name, eos_token_id=0)
    paths = {"teacher": {"path": str(root / "model")}, "student": {"path": str(root / "model")}}
    (root / "run" / "config.yaml").write_text(yaml.safe_dump(paths))
    answers = greedy_texts(root / "model")
    rows = [{"prompt": q, "answer": f"#{a}"} for q, a in zip(QUESTIONS, answers, strict=True)]
    rows[1]["answer"] = "#another"
    (root / "first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    rows[3]["data_source"] = "mine"
    (root / "second.jsonl").write_text(json.dumps(rows[3]) + "\n" + json.dumps(rows[3]) + "\n")
    return root


def greedy_texts(path):
    """By transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    texts = []
    for question in QUESTIONS:
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def evaluate(folder, *overrides):
    settings = {
        "output_dir": folder / "out",
        "data.paths": f"[{folder}/first.jsonl,{folder}/second.jsonl]",
        "data.grader": "final_hash",
        "max_response_tokens": MAX_TOKENS,
        "latency_problems": 2,
        "engine.kv_cache_gib": 0.03,
        "dashboard": "false",
    }
    return command_line("opsd.evaluate", [*(f"{key}={value}" for key, value in settings.items()), *overrides])


def test_figures_files_and_table_of_sampled_answers(folder, tmp_path):
    process = evaluate(
        folder, f"output_dir={tmp_path}/out", "samples_per_problem=3", f"+models.trained={folder}/run",
        "temperature=1.5", "top_k=20",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    model = summary["models"]["trained"]
    loaded = AutoModelForCausalLM.from_pretrained(folder / "run" / "student")
    assert model["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert model["weight_bytes"] == (folder / "run" / "student" / "model.safetensors").stat().st_size
    results = read_results(tmp_path / "out" / "trained.jsonl")
    assert [(r.data_source, r.row, r.prompt) for r in results] == [
        ("first", 0, QUESTIONS[0]), ("first", 1, QUESTIONS[1]), ("first", 2, QUESTIONS[2]),
        ("mine", 0, QUESTIONS[3]), ("mine", 1, QUESTIONS[3]),
    ]  # fmt: skip
    answers = [answer for result in results for answer in result.answers]
    assert len(answers) == 15 and len({answer.text for answer in answers}) > 10
    assert all(
        0 < answer.tokens <= MAX_TOKENS and answer.truncated <= (answer.tokens == MAX_TOKENS) for answer in answers
    )
    figures = model["figures"]["all"]
    assert figures["truncated"] == pytest.approx(sum(answer.truncated for answer in answers) / 15)
    assert figures["mean_tokens"] == pytest.approx(sum(answer.tokens for answer in answers) / 15)
    assert set(figures) == {"problems", "mean@3", "maj@3", "pass@1", "pass@2", "pass@3", "truncated", "mean_tokens"}
    speed = model["speed"]
    assert speed["tokens_per_s"] * speed["total_s"] == pytest.approx(sum(answer.tokens for answer in answers))
    assert speed["answer_s"] > 0 and speed["answer_tokens_per_s"] > 0
    assert "| trained | all | 5 |" in process.stdout and "| trained | 0.1 M |" in process.stdout
    assert "15/15" in process.stderr  # the progress


def test_greedy_answers_of_a_runs_models_are_those_of_transformers_and_graded_as_in_training(folder, tmp_path):
    """The run's teacher and its student before are one model, whose own answers are the references.

    In engines that start sooner than vLLM's, which `test_engines.py` compares with them on greedy answers.
    """
    process = evaluate(
        folder, f"output_dir={tmp_path}/out", f"run={folder}/run", "samples_per_problem=1", "temperature=0",
        "latency_problems=0", "engine.backend=transformers",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["models"]) == ["teacher", "before", "after"]
    expected = greedy_texts(folder / "model")
    for name in ("teacher", "before"):
        results = read_results(tmp_path / "out" / f"{name}.jsonl")
        assert [result.answers[0].text for result in results] == [*expected, expected[3]]
        grade = GRADERS["final_hash"]
        right = [grade(result.answers[0].text, result.reference).right for result in results]
        assert [result.answers[0].correct for result in results] == right
    assert summary["models"]["after"]["figures"] != summary["models"]["before"]["figures"]
    again = evaluate(folder, f"output_dir={tmp_path}/out", f"run={folder}/run", "samples_per_problem=1")
    assert again.returncode == 2 and "holds another evaluation" in again.stderr
