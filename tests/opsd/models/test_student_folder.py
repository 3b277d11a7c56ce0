"""Whatever a source folder holds, the trained student is written, with the source's own files."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.config.engine import TeacherConfig
from opsd.config.run import DataConfig, RunConfig, StudentConfig
from opsd.errors import StageError
from opsd.models.student_folder import save_student
from opsd.monitor.warned import Warned
from opsd.run import Run
from opsd.run_folder import RunFolder
from opsd.run_state import Ledger
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3


def sampling_without_do_sample(folder):
    """transformers reads such a generation config and refuses to write it."""
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.95, "eos_token_id": 0}')


def bare(folder):
    """No generation config, and of the tokenizer tokenizer.json only."""
    for name in ("generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink()


def of_another_version(folder):
    """Names of another transformers in the config and in the tokenizer's; templates in files of their own."""
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "tokenizer_class": "Qwen2TokenizerFast"}))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<end>"}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")


def with_a_draft_head(folder):
    """Weights in parts, some of which are not the model's; files of other tools beside them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["mtp.layers.0.weight"] = torch.arange(6.0)
    parts = {"model-1.safetensors": sorted(weights)[:5], "model-2.safetensors": sorted(weights)[5:]}
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "optimizer.pt").write_text("old")
    (folder / "onnx").mkdir()


def with_code_and_licence(folder):
    (folder / "modeling_tiny.py").write_text("x = 1\n")
    (folder / "LICENSE").write_text("free\n")
    (folder / "README.md").write_text("the base model's card\n")


ODD = (sampling_without_do_sample, bare, of_another_version, with_a_draft_head, with_code_and_licence)
WRITTEN_ANEW = ("config.json", "README.md", "optimizer.pt")


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_folder_gives_a_student(odd, tmp_path):
    source = make_tiny_qwen3(tmp_path / "source", tied=True, layers=1, seed=3, eos_token_id=0)
    make_char_tokenizer(source, eos_token_id=0)
    odd(source)
    trained = {name: weight + 1 for name, weight in AutoModelForCausalLM.from_pretrained(source).state_dict().items()}
    del trained["lm_head.weight"]
    out = tmp_path / "student"
    save_student(out, trained, str(source), trust_remote_code=False)
    student = AutoModelForCausalLM.from_pretrained(out)
    found = student.state_dict()
    assert found.keys() == {*trained, "lm_head.weight"}
    assert all(torch.equal(found[name], weight) for name, weight in trained.items())
    assert torch.equal(found["lm_head.weight"], trained["model.embed_tokens.weight"])
    for file in (f for f in source.rglob("*") if f.is_file() and not f.name.startswith(("model.", "model-"))):
        copy = out / file.relative_to(source)
        if file.name not in WRITTEN_ANEW:
            assert copy.read_bytes() == file.read_bytes(), file
    assert not (out / "optimizer.pt").exists() and not (out / "README.md").exists()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert after == before
    if odd is not bare:
        assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<end>") == 0
    if odd is with_a_draft_head:
        assert torch.equal(load_file(out / "model.safetensors")["mtp.layers.0.weight"], torch.arange(6.0))


def test_another_dtype_is_written_into_the_config_under_its_name_there(tmp_path):
    source = make_tiny_qwen3(tmp_path / "source", tied=False, layers=1, seed=3, eos_token_id=0)
    make_char_tokenizer(source, eos_token_id=0)
    of_another_version(source)
    trained = AutoModelForCausalLM.from_pretrained(source).state_dict()
    save_student(tmp_path / "student", trained, str(source), trust_remote_code=False, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").dtype == torch.bfloat16


def test_a_student_that_cannot_be_written_costs_neither_summary_nor_report(tmp_path, monkeypatch):
    cfg = RunConfig(
        output_dir=str(tmp_path / "run"),
        student=StudentConfig(path="student"),
        teacher=TeacherConfig(path="teacher"),
        data=DataConfig(train_path="train.jsonl", eval_path="eval.jsonl"),
    )
    figures = {"accuracy": 0.5, "reverse_kl": 0.1, "top1_agreement": 0.9}
    ledger = Ledger(last_step=300, done=300, before=figures, after=figures)
    ledger.timer.start()
    folder = RunFolder(cfg.output_dir)
    folder.path.mkdir()
    (folder.checkpoints.path / "step_000300").mkdir(parents=True)

    def no_space(folder):
        raise StageError(f"export: the student could not be written to {folder}: OSError: no space")

    reports = []
    parts = SimpleNamespace(
        cfg=cfg,
        folder=folder,
        setup=SimpleNamespace(device="cpu", support="teacher", adapter=None),
        learner=SimpleNamespace(save_student=no_space),
    )
    log = SimpleNamespace(log_report=reports.append)
    saver = SimpleNamespace(finish=lambda wait: None)
    unused = dict.fromkeys(("bar", "stop", "watch", "rollouts", "idle"))
    run = Run(parts=parts, ledger=ledger, log=log, saver=saver, warned=Warned(), **unused)
    monkeypatch.setattr("opsd.run.build_report", lambda folder: folder / "report.html")
    with pytest.raises(StageError, match=r"OSError: no space; .*/step_000300 has the weights: .*export.py"):
        run.finish()
    assert json.loads((folder.path / "summary.json").read_text())["accuracy_after"] == 0.5
    assert reports == [folder.path / "report.html"]
