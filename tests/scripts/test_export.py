"""From a run's folder to a model: whose weights, in which dtype, what the card says, and what is refused."""

import json
import shutil
from dataclasses import asdict

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import opsd.export as export_script
from opsd.checkpoints import Checkpoints
from opsd.config.engine import TeacherConfig
from opsd.config.run import DataConfig, LearnerConfig, RunConfig, StudentConfig
from opsd.files import file_sum
from opsd.learner.checkpoint import part_of_checkpoint
from opsd.learner.loading import load_student
from opsd.learner.model import DistillationModel, shard
from opsd.learner.optim import build_optimizer, build_scheduler
from opsd.models.student_folder import save_student
from opsd.ops.losses.divergences import reverse_kl
from opsd.types import Vocabulary
from tests.opsd.process_group import one_rank
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

SUMMARY = {
    "steps": 4,
    "support": "union",
    "accuracy_before": 0.25,
    "accuracy_after": 0.75,
    "teacher_accuracy": 0.875,
    "reverse_kl_before": 1.5,
    "reverse_kl_after": 0.125,
    "top1_agreement_before": None,
    "top1_agreement_after": None,
    "versions": {"torch": "9.9"},
    "git_commit": "abc",
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def run(request, tmp_path_factory):
    """A run of four steps: checkpoints of steps 2 and 4, whose weights all are 0.2 and 0.4; student/ not yet there."""
    root = tmp_path_factory.mktemp("run")
    base = make_tiny_qwen3(root / "base-model", tied=request.param, layers=1, seed=3, eos_token_id=0)
    make_char_tokenizer(base, eos_token_id=0)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nA base model.\n")
    cfg = RunConfig(
        output_dir=str(root / "run"),
        num_steps=4,
        student=StudentConfig(path=str(base)),
        teacher=TeacherConfig(path="/models/big-teacher"),
        data=DataConfig(train_path="/data/prompts.jsonl", eval_path="/data/eval.jsonl"),
    )
    with one_rank():
        causal_lm = load_student(str(base), attention="sdpa", trust_remote_code=False)
        model = DistillationModel(causal_lm, reverse_kl, Vocabulary(size=64, stop_ids=(0,)))
        shard(model, device="cpu", num_ranks=1, dtype="float32")
        optimizer = build_optimizer(model.parameters(), LearnerConfig())
        checkpoints = Checkpoints(root / "run" / "checkpoints")
        for step in (2, 4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(step / 10)
            unfinished = checkpoints.begin(step)
            scheduler = build_scheduler(optimizer, LearnerConfig(), 4)
            path = part_of_checkpoint(model, optimizer, scheduler, None).write(unfinished / "learner")
            checkpoints.finish(unfinished, {"step": step}, {path.name: file_sum(path)}, keep=9)
    (root / "run" / "config.yaml").write_text(yaml.safe_dump(asdict(cfg)))
    (root / "run" / "summary.json").write_text(json.dumps(SUMMARY))
    return root / "run"


def exported(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["export.py", *map(str, arguments)])
    export_script.main()
    return arguments[1]


def assert_all_weights(folder, value, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, weight in model.state_dict().items():
        assert weight.dtype == dtype
        torch.testing.assert_close(weight, torch.full_like(weight, value), rtol=0, atol=0, msg=name)
    assert AutoTokenizer.from_pretrained(folder).decode([1, 2]) == "01"
    assert model.generation_config.eos_token_id == 0


def test_a_run_is_exported_from_its_newest_checkpoint_with_its_figures(run, tmp_path, monkeypatch):
    out = exported(monkeypatch, run, tmp_path / "my-model")
    assert_all_weights(out, 0.4, torch.float32)
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    for fact in (
        "# my-model",
        "| base model | base-model |",
        "| teacher | big-teacher |",
        "| steps | 4 of 4 |",
        "| prompts | prompts.jsonl |",
        "| held-out accuracy, greedy | 0.250 | 0.750 |",
        "| reverse KL to the teacher, nats per token | 1.500 | 0.125 |",
        "| top-1 agreement with the teacher | not measured | not measured |",
        "| loss | reverse_kl, on the teacher's top tokens, the student's candidates and one rest bucket |",
        "torch 9.9",
    ):
        assert fact in card.text
    assert str(run.parent) not in card.text, "a model that is published must not tell the paths of its maker's machine"
    assert {file.stat().st_mode for file in out.iterdir()} == {(out / "config.json").stat().st_mode}


def test_an_earlier_checkpoint_in_bfloat16_has_no_figures(run, tmp_path, monkeypatch):
    out = exported(monkeypatch, run / "checkpoints" / "step_000002", tmp_path / "out", "--dtype", "bfloat16")
    assert_all_weights(out, torch.tensor(0.2).bfloat16(), torch.bfloat16)
    card = (out / "README.md").read_text()
    assert "| steps | 2 of 4 |" in card
    assert "Nothing was measured at this step." in card


def test_a_run_without_checkpoints_is_exported_from_its_student(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.yaml", "summary.json"):
        (copy / name).write_bytes((run / name).read_bytes())
    base = run.parent / "base-model"
    weights = AutoModelForCausalLM.from_pretrained(base).state_dict()
    save_student(
        copy / "student", {n: torch.full_like(w, 0.5) for n, w in weights.items()}, str(base), trust_remote_code=False
    )
    assert_all_weights(exported(monkeypatch, copy, tmp_path / "out"), 0.5, torch.float32)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("..", "neither a run's folder (with config.yaml) nor one of its checkpoints"),
        ("checkpoints/step_000002", "exists already: choose a new or an empty folder"),
    ],
)
def test_a_mistake_gets_one_message(run, tmp_path, monkeypatch, source, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit, match="error: ") as stopped:
        exported(monkeypatch, run / source, tmp_path / "full")
    assert said in str(stopped.value)


def test_a_damaged_checkpoint_and_a_lost_base_model_are_named(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shard = copy / "checkpoints" / "step_000004" / "learner" / "rank_0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(SystemExit, match="step_000004: rank_0.safetensors has other contents than were written"):
        exported(monkeypatch, copy, tmp_path / "out")
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["student"]["path"] = "models/gone"
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match=r"student.path=models/gone is not here: name .* by --base"):
        exported(monkeypatch, copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folders_own_word_is_not_taken_for_its_code(run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["student"]["trust_remote_code"] = True
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit, match="give --trust-remote-code if you trust the code in"):
        exported(monkeypatch, copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exported(monkeypatch, copy, tmp_path / "out", "--trust-remote-code")
    assert (tmp_path / "out" / "config.json").exists()
