"""From a LoRA run's checkpoint to the merged student and the adapter beside it."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from opsd.checkpoints import Checkpoints
from opsd.config.engine import TeacherConfig
from opsd.config.run import DataConfig, RunConfig
from opsd.files import file_sum
from tests.opsd.learner.test_lora import Learner
from tests.opsd.process_group import one_rank
from tests.scripts.test_export import SUMMARY, exported
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a checkpoint of two steps, and what the learner's weights were then."""
    root = tmp_path_factory.mktemp("run")
    base = make_tiny_qwen3(root / "base", tied=True, layers=1, seed=3, eos_token_id=0)
    make_char_tokenizer(base, eos_token_id=0)
    with one_rank():
        learner = Learner(str(base))
        for _ in range(2):
            learner.step()
        checkpoints = Checkpoints(root / "run" / "checkpoints")
        unfinished = checkpoints.begin(2)
        path = learner.part().write(unfinished / "learner")
        checkpoints.finish(unfinished, {"step": 2}, {path.name: file_sum(path)}, keep=1)
        weights = learner.weights()
    cfg = RunConfig(
        output_dir=str(root / "run"),
        student=learner.student,
        teacher=TeacherConfig(path="/models/big-teacher"),
        data=DataConfig(train_path="/data/prompts.jsonl"),
    )
    (root / "run" / "config.yaml").write_text(yaml.safe_dump(asdict(cfg)))
    return root / "run", weights


def test_the_merged_student_and_the_adapter_are_the_learners(run, tmp_path, monkeypatch):
    """Also where the run has ended, and its student/ is merged already."""
    folder, weights = run
    out = exported(monkeypatch, folder, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, weight in weights.items():
        assert torch.equal(model[name], weight), name
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "base")
    from_adapter = PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().state_dict()
    torch.testing.assert_close({name: from_adapter[name] for name in weights}, weights, rtol=0, atol=1e-6)
    assert "a LoRA adapter of rank 4, alpha 8, beside every linear layer; merged" in (out / "README.md").read_text()

    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    shutil.copytree(out, copy / "student")
    again = exported(monkeypatch, copy, tmp_path / "again")
    for name, weight in AutoModelForCausalLM.from_pretrained(again).state_dict().items():
        assert torch.equal(weight, model[name]), f"{name}: merged once"


def test_a_run_without_checkpoints_hands_on_its_adapter(run, tmp_path, monkeypatch):
    folder, _ = run
    copy = tmp_path / "run"
    copy.mkdir()
    shutil.copy(folder / "config.yaml", copy)
    (copy / "summary.json").write_text(json.dumps(SUMMARY))
    shutil.copytree(exported(monkeypatch, folder, tmp_path / "out"), copy / "student")
    again = exported(monkeypatch, copy, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / "adapter" / name).read_bytes() == (tmp_path / "out" / "adapter" / name).read_bytes()


def test_other_frozen_weights_are_refused(run, tmp_path, monkeypatch):
    folder, _ = run
    other = make_tiny_qwen3(tmp_path / "other", tied=True, layers=1, seed=4, eos_token_id=0)
    with pytest.raises(SystemExit, match="other: the checkpoint's adapter was trained beside other weights"):
        exported(monkeypatch, folder, tmp_path / "out", "--base", other)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["student"]["path"] = "models/gone"
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.copytree(folder.parent / "base", copy / "student")
    with pytest.raises(SystemExit, match=r"student.path=models/gone is not here: name .* by --base"):
        exported(monkeypatch, copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exported(monkeypatch, copy, tmp_path / "out", "--base", folder.parent / "base")
