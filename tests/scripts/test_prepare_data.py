"""Data sets into verl's format: whole, split, without duplicates, and back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from opsd.data.data_sets import BOXED_AFTER, DAPO_AFTER, DAPO_BEFORE
from opsd.data.prepare import arguments, prepare
from opsd.data.rows import read_rows
from opsd.errors import ConfigError, DataError


def run(output, *options):
    return prepare(arguments().parse_args([str(output), *map(str, options)]))


def fields(file):
    return [row.fields for row in read_rows(file)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dapo_row(question, answer):
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": DAPO_BEFORE + question + DAPO_AFTER}],
        "ability": "MATH",
        "reward_model": {"style": "rule-lighteval/MATH_v2", "ground_truth": answer},
        "extra_info": {"index": "a-b-c"},
    }


@pytest.fixture
def dapo(tmp_path):
    """100 questions, of which ten are there twice."""
    rows = [dapo_row(f"What is {i} + 1?", str(i + 1)) for i in [*range(100), *range(10)]]
    Dataset.from_list(rows).to_parquet(tmp_path / "dapo.parquet")
    return tmp_path / "dapo.parquet"


def test_dapo_is_split_by_a_seed_without_its_repeats(tmp_path, dapo):
    facts = run(tmp_path / "a", f"--train=dapo={dapo}", "--variant=boxed")
    assert "train.parquet 80 rows, val_dapo.parquet 20 rows; variant boxed, seed 42" in facts
    assert "10 repeated, 0 also in an evaluation set" in facts
    train, held_out = fields(tmp_path / "a" / "train.parquet"), fields(tmp_path / "a" / "val_dapo.parquet")
    questions = [row["extra_info"]["question"] for row in train + held_out]
    assert sorted(questions) == sorted(f"What is {i} + 1?" for i in range(100))
    assert train[0]["prompt"] == [{"role": "user", "content": train[0]["extra_info"]["question"] + BOXED_AFTER}]
    for row in train:
        assert int(row["extra_info"]["question"].split()[2]) + 1 == int(row["reward_model"]["ground_truth"])
    run(tmp_path / "b", f"--train=dapo={dapo}", "--variant=boxed")
    assert fields(tmp_path / "b" / "train.parquet") == train
    run(tmp_path / "c", f"--train=dapo={dapo}", "--variant=boxed", "--seed=1")
    assert fields(tmp_path / "c" / "train.parquet") != train


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("none", "What is 5 + 1?"),
        ("boxed", "What is 5 + 1?" + BOXED_AFTER),
        ("dapo", DAPO_BEFORE + "What is 5 + 1?" + DAPO_AFTER),
    ],
)
def test_a_variant_replaces_the_instruction_that_a_question_came_with(tmp_path, dapo, variant, expected):
    run(tmp_path, f"--train=dapo={dapo}", "--train-ratio=1", f"--variant={variant}")
    assert fields(tmp_path / "train.parquet")[5]["prompt"][0]["content"] == expected


def test_aime_has_its_answer_in_a_field_or_in_the_solutions_box(tmp_path):
    boxed = {"Problem": "Find x.", "Solution": r"As $\boxed{1}$ fails, \boxed{\frac{a}{\sqrt{2}}}."}
    Dataset.from_list([boxed]).to_parquet(tmp_path / "aime24.parquet")
    write_jsonl(tmp_path / "aime25.jsonl", [{"problem": "Find y.", "answer": "070"}])
    run(tmp_path, f"--eval=aime24={tmp_path}/aime24.parquet", f"--eval=aime25={tmp_path}/aime25.jsonl")
    [first], [second] = fields(tmp_path / "val_aime24.parquet"), fields(tmp_path / "val_aime25.parquet")
    assert first["reward_model"]["ground_truth"] == r"\frac{a}{\sqrt{2}}"
    assert first["extra_info"] == {"split": "test", "index": 0, "question": "Find x.", "solution": boxed["Solution"]}
    assert (second["data_source"], second["reward_model"]["ground_truth"]) == ("aime25", "070")


def test_training_rows_that_are_evaluated_on_are_reported_and_left_out(tmp_path, capsys):
    train = [{"question": q, "answer": "#### 1"} for q in ("What is 3 + 4?", "what  IS 3+4 ?", "What is 3 - 4?")]
    evaluation = [{"problem": "What is 3 + 4?", "answer": "7"}, {"problem": "What is 3 + 4?", "answer": "7"}]
    facts = run(
        tmp_path / "out",
        f"--train=gsm8k={write_jsonl(tmp_path / 'a.jsonl', train)}",
        f"--eval=math500={write_jsonl(tmp_path / 'b.jsonl', evaluation)}",
    )
    assert [row["extra_info"]["question"] for row in fields(tmp_path / "out" / "train.parquet")] == ["What is 3 - 4?"]
    assert len(fields(tmp_path / "out" / "val_math500.parquet")) == 2
    assert "1 repeated, 1 also in an evaluation set" in facts
    said = capsys.readouterr().err
    assert "1 of 2 training rows are also in val_math500 and are left out" in said and "What is 3 + 4?" in said


def test_verl_rows_of_any_kind_come_out_as_they_went_in(tmp_path):
    rows = [{**dapo_row(f"{i}?", str(i)), "data_source": "mine", "weight": 0.5} for i in range(3)]
    Dataset.from_list(rows).to_parquet(tmp_path / "in.parquet")
    run(tmp_path, f"--train=mine={tmp_path}/in.parquet")
    assert fields(tmp_path / "train.parquet") == rows
    run(tmp_path, f"--train=mine={tmp_path}/train.parquet", "--format=jsonl")
    assert fields(tmp_path / "train.jsonl") == rows


def test_chat_data_becomes_verl_rows(tmp_path):
    chat = [
        {"talk": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "label": 5},
        {"talk": "Bye"},
    ]
    run(tmp_path, f"--train=mine={write_jsonl(tmp_path / 'c.jsonl', chat)}", "--prompt-key=talk", "--answer-key=label")
    first, second = fields(tmp_path / "train.parquet")
    assert first == {
        "data_source": "mine", "prompt": chat[0]["talk"], "ability": "chat",
        "reward_model": {"style": "rule", "ground_truth": "5"}, "extra_info": {"split": "train", "index": 0},
    }  # fmt: skip
    assert second["prompt"] == [{"role": "user", "content": "Bye"}]
    assert second["reward_model"]["ground_truth"] is None


@pytest.mark.parametrize(
    ("variable", "name", "file", "keys"),
    [
        ("GSM8K_DIR", "gsm8k", "train.jsonl", ("question", "answer")),
        ("GSM8K_DIR", "gsm8k", "test.jsonl", ("question", "answer")),
        ("MATH500_DIR", "math500", "test.jsonl", ("problem", "answer")),
    ],
)
def test_the_real_sets_go_through_parquet_and_back_unchanged(tmp_path, variable, name, file, keys):
    if variable not in os.environ:
        pytest.skip(f"set {variable} to the folder of {name}'s {file}")
    source = Path(os.environ[variable]) / file
    expected = [tuple(row[key] for key in keys) for row in fields(source)]
    run(tmp_path, f"--eval={name}={source}", "--variant=boxed")
    rows = fields(tmp_path / f"val_{name}.parquet")
    assert [(row["extra_info"]["question"], row["extra_info"]["solution"]) for row in rows] == expected
    assert [row["prompt"][0]["content"] for row in rows] == [question + BOXED_AFTER for question, _ in expected]
    truths = [answer.rpartition("#### ")[2] for _, answer in expected]
    if name == "gsm8k":
        truths = [truth.replace(",", "") for truth in truths]
    assert [row["reward_model"]["ground_truth"] for row in rows] == truths


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "nothing to prepare"),
        (["--eval=gsm8k=nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
        (["--eval=mine"], "mine: no test split of it is known on the hub: give a file, mine=FILE"),
        (["--train=math500"], "math500: no train split of it is known on the hub"),
        (["--train=gsm8k={}", "--train-ratio=0"], "--train-ratio must be in (0, 1], got 0.0"),
        (["--eval=gsm8k={}"], "rows.jsonl, line 1: expected a question in one of question, problem"),
        (["--eval=mine={}"], "rows.jsonl, line 1: expected an object with 'prompt', got text"),
        (["--eval=mine={}", "--eval=mine={}", "--prompt-key=text"], "there are two evaluation sets mine"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, options, said):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "1"}])
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out", *(option.format(file) for option in options))
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_no_folder_and_no_parquet_file_can_hold_is_one_message(tmp_path):
    row = {"prompt": "1+1=", "reward_model": {"ground_truth": "2"}, "index": 10**30}
    rows = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ConfigError, match="^output=.*rows.jsonl/out lies below .*rows.jsonl, which is a file$"):
        run(rows / "out", f"--train=mine={rows}")
    with pytest.raises(DataError, match="train.parquet: parquet cannot hold a field's values: .*; try --format jsonl"):
        run(tmp_path / "out", f"--train=mine={rows}")
    run(tmp_path / "out", f"--train=mine={rows}", "--format=jsonl")
    assert fields(tmp_path / "out" / "train.jsonl")[0]["index"] == 10**30


def test_the_command_says_its_mistake_without_a_traceback(tmp_path):
    command = [sys.executable, "scripts/prepare_data.py", str(tmp_path), "--eval", "mine=nowhere.jsonl"]
    root = Path(__file__).resolve().parents[2]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, env={"PYTHONPATH": "."})
    assert process.returncode == 1
    assert process.stderr == "error: nowhere.jsonl: there is no such file\n"
