"""The pairs of the recipes: their files, the dropped layers, and folders that are finished or absent."""

import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import make_pair
from hf_models import drop_layers, load_model, save_model
from make_pair import PairError, alone, check_accuracies, is_finished, make_dropped, unfinished, write_record
from pairs.sums import SUMS, TEACHER
from pairs.training import build_model


@pytest.mark.parametrize(("teacher", "student", "shown"), [(0.9, 0.2, 1), (1, 0.05, 1), (1, 0.5, 1), (1, 0.2, 0.4)])
def test_unusable_accuracies_are_refused(teacher, student, shown):
    with pytest.raises(PairError, match="unusable pair"):
        check_accuracies(0.97, (0.1, 0.38), teacher=teacher, student=student, student_shown=shown)
    check_accuracies(0.97, (0.1, 0.38), teacher=0.99, student=0.2, student_shown=0.9)


def tiny_llama(folder: Path) -> LlamaForCausalLM:
    """Six layers, the norm weight of layer i filled with i."""
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.weight.data.fill_(index)
    save_model(model, SUMS.tokenizer(), folder)
    return model


def test_drop_layers_keeps_the_others_in_order_and_the_rest_of_the_model(tmp_path):
    source = tiny_llama(tmp_path / "source")
    make_dropped(tmp_path / "source", tmp_path / "thin", [1, 4])
    thin, tokenizer = load_model(tmp_path / "thin")
    assert [layer.input_layernorm.weight[0].item() for layer in thin.model.layers] == [0.0, 2.0, 3.0, 5.0]
    assert thin.config.num_hidden_layers == 4
    assert torch.equal(thin.model.embed_tokens.weight, source.model.embed_tokens.weight)
    assert torch.equal(thin.model.layers[2].mlp.up_proj.weight, source.model.layers[3].mlp.up_proj.weight)
    assert tokenizer.decode(tokenizer.encode("1+2?")) == "1+2?"


def test_dropped_model_of_per_layer_types_still_loads_and_generates(tmp_path):
    model = build_model(TEACHER, 17)
    drop_layers(model, [1])
    save_model(model, SUMS.tokenizer(), tmp_path)
    thin, _ = load_model(tmp_path)
    assert len(thin.config.layer_types) == len(thin.model.layers) == 2
    ids = torch.tensor([[3, 4, 5]])
    assert torch.allclose(thin(ids, use_cache=False).logits, thin(ids).logits)


@pytest.mark.parametrize("dropped", [[6], [-1], [], [0, 1, 2, 3, 4, 5]])
def test_wrong_layers_are_refused(tmp_path, dropped):
    model = tiny_llama(tmp_path)
    with pytest.raises(ValueError, match="some, not all, of 0..5"):
        drop_layers(model, dropped)


def test_interrupted_run_leaves_no_folder_and_is_redone(tmp_path):
    out, settings = tmp_path / "pair", {"kind": "test"}
    with pytest.raises(KeyboardInterrupt), unfinished(out) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not is_finished(out, settings)
    with unfinished(out) as folder:
        write_record(folder, settings)
    assert is_finished(out, settings) and not (out / "half").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_a_folder_with_something_else_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PairError, match="choose another folder"):
        is_finished(tmp_path, {"kind": "sums", "seed": 0})
    write_record(tmp_path, {"kind": "sums", "seed": 1})
    with pytest.raises(PairError, match="'seed': 1"):
        is_finished(tmp_path, {"kind": "sums", "seed": 0})


def test_sums_writes_the_prompt_files_and_does_nothing_the_second_time(tmp_path, monkeypatch):
    trainings = []

    def train_pair(folder, plan, seed, probe, evaluation):
        assert plan is SUMS
        trainings.append(({p.prompt for p in probe}, {p.prompt for p in evaluation}))
        return {"teacher": 1.0, "student": 0.2}

    monkeypatch.setattr("pairs.training.train_pair", train_pair)  # a minute of training, covered by the quick start
    for _ in range(2):
        make_pair.main(["sums", str(tmp_path / "pair"), "--seed", "3"])
    ((probe, evaluation),) = trainings
    train = [json.loads(line) for line in (tmp_path / "pair" / "train.jsonl").open()]
    held_out = [json.loads(line) for line in (tmp_path / "pair" / "eval.jsonl").open()]
    assert len(train) >= 20_000 and {row["prompt"] for row in held_out} == evaluation and len(evaluation) == 500
    assert not {row["prompt"] for row in train} & (evaluation | probe) and not evaluation & probe
    assert all(eval(row["prompt"].rstrip("?")) == int(row["answer"]) for row in held_out)


def test_a_source_that_is_no_model_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="make_pair: .* is no Hugging Face model folder"):
        make_pair.main(["drop-layers", str(tmp_path / "none"), str(tmp_path / "out"), "--drop", "1"])
    assert not (tmp_path / "out").exists()


def test_two_that_make_the_same_folder_at_once_make_it_one_after_the_other(tmp_path):
    out, order = tmp_path / "new" / "pair", []

    def second():
        with alone(out):
            order.append("second")

    with alone(out):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
