"""Whole runs on the inputs that people have, the wrong ones too."""

import json
import math
import shutil

import pytest
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from opsd.config.run import DataConfig
from opsd.data.grading import judge_all
from opsd.data.prompts import load_prompts
from tests.integration.runs import TRANSFORMERS, finished, train, training_lines
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

FEW_NAMES = (*TRANSFORMERS, "loss.support=teacher", "teacher.top_k=3", "selector=all")


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_transformers_backends_union_support_and_jsd(pair, tmp_path):
    """The machine without vLLM; the teacher scores the student's own candidates, the learner makes the statistics."""
    folder = finished(
        pair, tmp_path / "run", *TRANSFORMERS, "loss.support=union", "loss.divergence=jsd", "+loss.options={beta: 0.3}",
        "selector=q3", "selector.ratio=0.25", "selector.scope=batch", "stats=learner",
    )  # fmt: skip
    lines = training_lines(folder)
    assert all(0 < line["loss"] < 0.6931 for line in lines)  # a Jensen-Shannon divergence is at most log 2
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["kept_ratio"] == pytest.approx(0.25, abs=0.01) for line in lines)


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_the_residual_trains_on_the_teachers_top_k(pair, tmp_path):
    with_residual = training_lines(finished(pair, tmp_path / "residual", *FEW_NAMES, "loss.residual=true"))
    for line in with_residual:
        assert math.isfinite(line["loss"]) and line["loss"] > 0 and math.isfinite(line["grad_norm"])
    assert with_residual[-1]["reverse_kl"] < with_residual[0]["reverse_kl"]
    for line in with_residual:  # figures of both models
        assert 0.0 < line["overlap_ratio"] == line["kept_overlap_ratio"] < 1.0
        assert 0.0 < line["overlap_token_advantage"] < 1.0 and math.isfinite(line["coarse_kl_gap"])


@pytest.mark.long
@pytest.mark.usefixtures("joined")
def test_the_residuals_first_gradient_is_another_than_the_coarse_ones(pair, tmp_path):
    """The loss is a lower bound with fewer names."""
    [first, *_] = training_lines(finished(pair, tmp_path / "residual", *FEW_NAMES, "loss.residual=true"))
    [coarse, *_] = training_lines(finished(pair, tmp_path / "coarse", *FEW_NAMES))
    assert first["loss"] < coarse["loss"] and first["grad_norm"] > 1.05 * coarse["grad_norm"]


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_a_verl_parquet_file_trains_and_is_graded_as_it_is(pair, tmp_path):
    """As `datasets` writes it, and no setting says how it is made, but for the template that the tiny model lacks."""
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{a}+{b}="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(a + b)},
            "extra_info": {"split": "train", "index": 10 * a + b},
        }
        for a in range(5)
        for b in range(5)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "sums.parquet")
    folder = finished(
        pair, tmp_path / "run", f"data.train_path={tmp_path}/sums.parquet", f"data.eval_path={tmp_path}/sums.parquet",
        "num_steps=2", "data.grader=math", "eval.num_problems=4", "data.chat_template=false", *TRANSFORMERS,
    )  # fmt: skip
    assert [0 <= line["accuracy_train"] <= 1 for line in training_lines(folder)] == [True, True]
    assert 0 <= json.loads((folder / "summary.json").read_text())["accuracy_after"] <= 1
    data = DataConfig(train_path="", eval_path="", grader="math", chat_template=False)
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    for prompt in load_prompts(str(tmp_path / "sums.parquet"), data, tokenizer, 20).prompts:
        first, second = prompt.text.removesuffix("=").split("+")
        for off_by in (0, 1):
            [judgement] = judge_all(["math"], [f"it is {int(first) + int(second) + off_by}"], [prompt.answer])
            assert judgement.right is (off_by == 0)


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_conversations_train_without_evaluation_in_batches_larger_than_the_file(pair, tmp_path):
    """Three prompts for batches of five, through the chat template; one reference that no parser gets to the end of."""
    student = shutil.copytree(pair / "student", tmp_path / "student")
    (student / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}=")
    rows = [{"messages": [{"role": "user", "content": f"1+{i}"}], "answer": str(i + 1)} for i in range(3)]
    rows[2]["answer"] = "9^{9^{9^9}}"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    process = train(
        pair, tmp_path / "run", f"student.path={student}", f"data.train_path={tmp_path}/rows.jsonl", "data.eval_path=",
        "data.prompt_key=messages", "data.prompts_per_step=5", "data.grader=math", "num_steps=2",
        *TRANSFORMERS, "log.token_view_rollouts=5",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    assert "rows.jsonl: 3 prompts, all through the chat template\n        the first: '1+0='" in process.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    figures = ("accuracy_before", "accuracy_after", "reverse_kl_before", "reverse_kl_after", "teacher_accuracy")
    assert [summary[name] for name in figures] == [None] * 5
    lines = training_lines(tmp_path / "run")
    assert sum(line["grader_timeouts"] for line in lines) == summary["grader_timeouts"] > 0
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.long
@pytest.mark.usefixtures("joined")
def test_a_teacher_without_numbers_stops_the_run(pair, tmp_path):
    """Every logit is NaN, of one weight as a whole: one message, no step taken. test_poison has one number of it."""
    broken = tmp_path / "broken"
    make_tiny_qwen3(broken, tied=False, layers=3, seed=1, eos_token_id=0)
    make_char_tokenizer(broken, eos_token_id=0)
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][:] = float("nan")
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    process = train(pair, tmp_path / "run", f"teacher.path={broken}", *TRANSFORMERS)
    assert process.returncode != 0
    assert "Qwen3ForCausalLM has logits that are no numbers (NaN)" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("learner.learning_rat=1", "learning_rat"),
        ("selector.ratio=1.5", "selector.ratio must be in (0, 1], got 1.5"),
        ("stats=exact", "stats must be one of rollout, learner, got 'exact'"),
        ("student.path=/no/such/model", "student.path=/no/such/model: there is no model here"),
        ("hooks=no.such:build_hooks", "cannot import no"),
    ],
)
def test_a_mistake_gets_one_message_and_no_traceback(pair, tmp_path, override, said):
    process = train(pair, tmp_path / "run", override)
    assert process.returncode != 0
    assert said in process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()
