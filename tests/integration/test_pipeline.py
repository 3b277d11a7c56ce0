"""A run, ended and resumed and longer, with students in real vLLM engines, Ray actors and FSDP2 ranks."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tip.plugin
from tests.integration.runs import NUM_STEPS, finished, losses, train, train_as_a_user, training_lines, weights

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
TEACHER = "teacher.backend=transformers"


@pytest.fixture(scope="module")
def unbroken(pair, joined, tmp_path_factory):
    return finished(pair, tmp_path_factory.mktemp("runs") / "unbroken", TEACHER)


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

    It is a process with a Ray of its own, as a user starts it. With checkpoint.every=0 what there is to
    go on from was saved when the run was told to stop.
    """
    folder = tmp_path / "stopped"
    again = [TEACHER, "checkpoint.every=0", "hooks=tests.integration.test_pipeline:hooks_of_a_run_that_is_ended"]
    with pytest.MonkeyPatch.context() as alone:
        alone.delenv("RAY_ADDRESS")
        process = train_as_a_user(pair, folder, *again)
    assert process.returncode == 130
    assert process.stderr.splitlines()[-1] == (
        f"stopped after step 4 of {NUM_STEPS}: {folder} has a checkpoint after step 4, from which resume=auto continues"
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


def test_a_finished_run_goes_on_for_longer_on_two_ranks(pair, unbroken, tmp_path):
    """The steps that are there stay; the next ones have the learning rates of a run of eight steps from the start."""
    folder = tmp_path / "longer"
    shutil.copytree(unbroken, folder)
    wider = ["learner.num_workers=2", "rollout.group_size=2", "learner.micro_batch_tokens=96"]
    process = train(pair, folder, TEACHER, "num_steps=8", "resume=auto", *wider)
    assert process.returncode == 0, process.stderr[-4000:]
    assert losses(folder)[:NUM_STEPS] == losses(unbroken) and len(losses(folder)) == 8
    rates = [line["learning_rate"] for line in training_lines(folder)[NUM_STEPS:]]
    assert rates == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 8)) / 2 for step in (6, 7)])
    assert "resume  learner.num_workers=2, it was 1\n" in process.stderr
    assert (
        "resume  num_steps=8, it was 6: the learning rate follows the longer run's cosine, at the next step 0.000146 "
        "and not 0\n"
    ) in process.stderr
