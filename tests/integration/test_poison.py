"""Whole runs with models that no one should train with or learn from: one line says which and why."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.runs import TRANSFORMERS, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
UP = "model.layers.1.mlp.up_proj.weight"


def changed(folder, copy, name, change):
    """A copy of a model's folder with one weight changed in place."""
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    change(weights[name])
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def nan(weight):
    weight[3, 7] = torch.nan


def error_of(run):
    assert run.returncode == 2, run.stderr[-4000:]
    [line] = [line for line in run.stderr.splitlines() if line.startswith("error")]
    assert run.stderr.splitlines()[-1] == line
    return line


def test_a_student_with_nan_is_refused_by_the_weight_s_name(pair, tmp_path):
    student = changed(pair / "student", tmp_path / "student", UP, nan)
    line = error_of(train(pair, tmp_path / "run", f"student.path={student}", *TRANSFORMERS))
    assert line.endswith(
        f"path={student}: Qwen3ForCausalLM has logits that are no numbers (NaN): its weight {UP} holds NaN or infinity"
    )


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (UP, nan, f"teacher.*, path=.*/teacher: Qwen3ForCausalLM has logits .*: its weight {UP} holds NaN or infinity"),
        ("lm_head.weight", torch.Tensor.zero_, "score: the teacher .*/teacher gives every token the same log-prob"),
    ],
    ids=["nan", "uniform"],
)
def test_a_teacher_that_says_nothing_ends_the_run(pair, tmp_path, name, change, said):
    teacher = changed(pair / "teacher", tmp_path / "teacher", name, change)
    line = error_of(train(pair, tmp_path / "run", f"teacher.path={teacher}", *TRANSFORMERS))
    assert re.match(f"error: {said}", line), line
