"""Whole runs with real vLLM engines, Ray actors and FSDP2 ranks, on models that are made in a second."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer

import tip.plugin
from opsd.config import DataConfig
from opsd.data.grading import GRADERS
from opsd.data.prompts import load_prompts
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An untied teacher and a tied student that share a tokenizer, with prompts."""
    root = tmp_path_factory.mktemp("pair")
    for name, tied, layers, seed in (("teacher", False, 3, 1), ("student", True, 2, 2)):
        make_tiny_qwen3(root / name, tied=tied, layers=layers, seed=seed, eos_token_id=0, scale=2.0)
        make_char_tokenizer(root / name, eos_token_id=0)
    rows = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a in range(10) for b in range(10)]
    (root / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return root


def train(pair, output_dir, *overrides, program="tip.train"):
    """One run in a process of its own, as a user starts it; returns the finished process."""
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
    command = [sys.executable, "-m", program, *(f"{name}={value}" for name, value in settings.items()), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def finished(pair, output_dir, *overrides, program="tip.train"):
    process = train(pair, output_dir, *overrides, program=program)
    assert process.returncode == 0, process.stderr[-4000:]
    return output_dir


def training_lines(output_dir):
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def losses(output_dir):
    return [line["loss"] for line in training_lines(output_dir)]


def weights(output_dir):
    return load_file(output_dir / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def unbroken(pair, tmp_path_factory):
    return finished(pair, tmp_path_factory.mktemp("runs") / "unbroken")


def test_a_run_leaves_what_a_user_needs(unbroken, pair):
    summary = json.loads((unbroken / "summary.json").read_text())
    assert summary["steps"] == NUM_STEPS
    assert summary["reverse_kl_after"] < summary["reverse_kl_before"]
    assert 0.4 <= summary["kept_ratio"] <= 0.5
    assert summary["tokens_trained"] < summary["tokens_scored"] == summary["tokens_generated"]
    assert set(summary["phase_s"]) == {"rollout", "score", "select", "learn", "sync", "evaluate", "other"}
    for name in (
        "accuracy_before",
        "accuracy_after",
        "teacher_accuracy",
        "versions",
        "config",
        "seed",
        "git_commit",
        "wall_s",
    ):
        assert name in summary
    assert [line["step"] for line in training_lines(unbroken)] == list(range(1, NUM_STEPS + 1))
    assert "<html" in (unbroken / "report.html").read_text()
    before = load_file(pair / "student" / "model.safetensors")
    after = weights(unbroken)
    assert before.keys() == after.keys()
    assert any((before[name] - after[name]).abs().max() > 1e-4 for name in before)


def test_the_student_loads_in_transformers_and_generates(unbroken):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(unbroken / "student")
    model = AutoModelForCausalLM.from_pretrained(unbroken / "student")
    output = model.generate(**tokenizer("1+2=", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert output.shape[1] > 4


def hooks_of_a_run_that_is_ended(cfg):
    """The run's scheduler sends SIGTERM in its fourth step, once."""
    hooks = tip.plugin.build_hooks(cfg)
    ended = Path(cfg.output_dir) / "ended"

    def select(batch):
        if batch.step == 3 and not ended.exists():
            ended.touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return hooks.select(batch)

    return dataclasses.replace(hooks, select=select)


def test_ended_and_resumed_equals_unbroken(pair, unbroken, tmp_path):
    """Losses and weights, bit for bit; the first part is also the same run again with the same seed.

    checkpoint.every is 0, as by default: what there is to go on from was saved when the run was told to stop.
    """
    folder = tmp_path / "stopped"
    again = ["hooks=tests.integration.test_pipeline:hooks_of_a_run_that_is_ended"]
    process = train(pair, folder, *again)
    assert process.returncode == 130
    assert process.stderr.splitlines()[-1] == (
        f"stopped after step 4 of {NUM_STEPS}: {folder} has a checkpoint after step 4, from which resume=auto goes on"
    )
    assert "Traceback" not in process.stderr
    assert losses(folder) == losses(unbroken)[:4]
    assert "has not finished" in (folder / "report.html").read_text()
    assert not (folder / "summary.json").exists()
    finished(pair, folder, *again, "resume=auto")
    assert losses(folder) == losses(unbroken)
    assert not list(folder.glob("*.replaced_*"))
    resumed, whole = weights(folder), weights(unbroken)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    first, second = (json.loads((run / "summary.json").read_text()) for run in (folder, unbroken))
    assert {k: first[k] for k in ("tokens_generated", "tokens_trained", "reverse_kl_before", "reverse_kl_after")} == {
        k: second[k] for k in ("tokens_generated", "tokens_trained", "reverse_kl_before", "reverse_kl_after")
    }


@pytest.mark.slow
def test_a_finished_run_goes_on_for_longer_on_two_ranks(pair, unbroken, tmp_path):
    """The steps that are there stay; the next ones have the learning rates of a run of eight steps from the start."""
    folder = tmp_path / "longer"
    shutil.copytree(unbroken, folder)
    wider = ["learner.num_workers=2", "rollout.num_workers=2", "rollout.group_size=2", "learner.micro_batch_tokens=96"]
    process = train(pair, folder, "num_steps=8", "resume=auto", *wider)
    assert process.returncode == 0, process.stderr[-4000:]
    assert losses(folder)[:NUM_STEPS] == losses(unbroken) and len(losses(folder)) == 8
    rates = [line["learning_rate"] for line in training_lines(folder)[NUM_STEPS:]]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (6, 7)])
    assert "resume  learner.num_workers=2, it was 1\n" in process.stderr
    assert (
        "resume  num_steps=8, it was 6: the learning rate follows the longer run's cosine, at the next step 0.000146 "
        "and not 0\n"
    ) in process.stderr


def test_selector_all_equals_no_tip_and_more_workers_give_the_same_run(pair, tmp_path):
    """Bit for bit on one rank; two ranks add in another order, so a little less than that."""
    with_tip = finished(pair, tmp_path / "tip", "selector=all")
    without = finished(pair, tmp_path / "plain", program="opsd.train")
    assert losses(with_tip) == losses(without)
    a, b = weights(with_tip), weights(without)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert training_lines(without)[0]["kept_ratio"] == 1.0
    workers = finished(pair, tmp_path / "workers", "selector=all", "learner.num_workers=2", "rollout.num_workers=2")
    assert losses(workers)[0] == pytest.approx(losses(without)[0], rel=1e-5)
    assert losses(workers) == pytest.approx(losses(without), rel=2e-2)  # later rollouts may differ in a token


def test_transformers_backends_union_support_and_jsd(pair, tmp_path):
    """The machine without vLLM; the teacher scores the student's own candidates, the learner makes the statistics."""
    folder = finished(
        pair, tmp_path / "run", "rollout.backend=transformers", "teacher.backend=transformers", "loss.support=union",
        "loss.divergence=jsd", "+loss.options={beta: 0.3}", "selector=q3", "selector.ratio=0.25",
        "selector.scope=batch", "stats=learner",
    )  # fmt: skip
    lines = training_lines(folder)
    assert all(0 < line["loss"] < 0.6931 for line in lines)  # a Jensen-Shannon divergence is at most log 2
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(line["kept_ratio"] == pytest.approx(0.25, abs=0.01) for line in lines)


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
        "num_steps=2", "data.grader=math", "eval.num_problems=4", "data.chat_template=false",
    )  # fmt: skip
    assert [0 <= line["accuracy_train"] <= 1 for line in training_lines(folder)] == [True, True]
    assert 0 <= json.loads((folder / "summary.json").read_text())["accuracy_after"] <= 1
    data = DataConfig(train_path="", eval_path="", grader="math", chat_template=False)
    tokenizer = AutoTokenizer.from_pretrained(pair / "student")
    for prompt in load_prompts(str(tmp_path / "sums.parquet"), data, tokenizer, 20).prompts:
        first, second = prompt.text.removesuffix("=").split("+")
        assert GRADERS["math"](f"it is {int(first) + int(second)}", prompt.answer)
        assert not GRADERS["math"](f"it is {int(first) + int(second) + 1}", prompt.answer)


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
        "rollout.backend=transformers", "teacher.backend=transformers", "log.token_view_rollouts=5",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    assert "rows.jsonl: 3 prompts, all through the chat template\n        the first: '1+0='" in process.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    figures = ("accuracy_before", "accuracy_after", "reverse_kl_before", "reverse_kl_after", "teacher_accuracy")
    assert [summary[name] for name in figures] == [None] * 5
    lines = training_lines(tmp_path / "run")
    assert sum(line["grader_timeouts"] for line in lines) == summary["grader_timeouts"] > 0
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_teacher_without_numbers_stops_the_run(pair, tmp_path):
    """Every logit is NaN: one message, no step taken."""
    broken = tmp_path / "broken"
    make_tiny_qwen3(broken, tied=False, layers=3, seed=1, eos_token_id=0)
    make_char_tokenizer(broken, eos_token_id=0)
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][:] = float("nan")
    from safetensors.torch import save_file

    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    process = train(
        pair, tmp_path / "run", f"teacher.path={broken}", "teacher.backend=transformers", "rollout.backend=transformers"
    )
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


def test_a_ratio_that_follows_the_loss_is_resumed_and_the_same_on_two_ranks(pair, tmp_path):
    """AdaKD: the kept share of every step, which is the state of LATF made visible."""
    adakd = [
        "method=adakd", "selector.scope=batch", "+selector.schedule_options={beta: 0.3, num_warmup: 2}",
        "rollout.backend=transformers", "teacher.backend=transformers",
    ]  # fmt: skip

    def kept(folder):
        return [line["kept_ratio"] for line in training_lines(folder)]

    unbroken = finished(pair, tmp_path / "whole", *adakd)
    whole = kept(unbroken)
    assert whole[0] == 1.0 and whole[-1] < 0.95
    finished(pair, tmp_path / "parts", *adakd, "stop_at_step=4")
    parts = finished(pair, tmp_path / "parts", *adakd, "resume=auto")
    assert kept(parts) == whole
    assert losses(parts) == losses(unbroken)
    resumed, expected = weights(parts), weights(unbroken)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    assert kept(finished(pair, tmp_path / "ranks", *adakd, "learner.num_workers=2")) == pytest.approx(whole, abs=0.02)
