"""The pairs of the recipes: the sum task, its split, the dropped layers, and folders that are finished or absent."""

import json
from importlib.resources import files
from itertools import islice
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import make_pair
from hf_models import drop_layers, load_model, save_model
from make_pair import PairError, check_accuracies, is_finished, make_dropped, unfinished, write_record
from opsd.config.run import DataConfig
from opsd.data.prompts import load_prompts
from sum_pair import (
    COPYING_STUDENT,
    EOS_ID,
    IGNORED,
    STUDENT,
    TEACHER,
    build_model,
    collate,
    draw_texts,
    greedy_accuracy,
)
from sum_task import (
    EOS,
    MAX_RESPONSE_TOKENS,
    Problem,
    build_tokenizer,
    distinct_problems,
    draw_problems,
    is_right,
)


def test_worked_answer_of_the_documented_example():
    problem = Problem((7, 3, 9))
    assert (problem.prompt, problem.response, problem.answer) == ("7+3+9?", "7+3=10;10+9=19#19", "19")


def test_every_step_of_a_response_is_true_and_fits():
    for problem in islice(draw_problems("steps", held_out=False), 500):
        steps, _, final = problem.response.partition("#")
        assert int(final) == sum(problem.terms)
        for step, term in zip(steps.split(";"), problem.terms[1:], strict=True):
            left, _, right = step.partition("=")
            assert sum(map(int, left.split("+"))) == int(right) and left.endswith(f"+{term}")
        assert len(problem.response) + 1 <= MAX_RESPONSE_TOKENS


def test_training_never_sees_a_held_out_problem():
    held_out = {problem.prompt for problem in distinct_problems(800, "a", held_out=True)}
    seen = {problem.prompt for problem in islice(draw_problems("b", held_out=False), 20_000)}
    assert len(held_out) == 800 and not held_out & seen


@pytest.mark.parametrize(
    ("response", "right"), [("7+3=10;10+9=19#19", True), ("#19", True), ("#18", False), ("19", False), ("#19#", False)]
)
def test_grading_reads_what_follows_the_last_mark(response, right):
    assert is_right(response, Problem((7, 3, 9))) is right


def test_saved_tokenizer_round_trips_one_token_a_character(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "7+3+9?7+3=10;10+9=19#19"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text
    assert tokenizer.encode(EOS) == [tokenizer.eos_token_id] == [EOS_ID]
    with pytest.raises(Exception, match="UNK"):  # the type that the tokenizers library raises
        tokenizer.encode("7 + x")


def test_labels_are_the_response_shifted_by_one():
    short, long = Problem((1, 2, 3)), Problem((1, 2, 3, 4))
    texts = [
        (short.prompt, short.response),
        (short.prompt_showing(short.response), short.response),
        (long.prompt, long.response),
    ]
    tokenizer = build_tokenizer()
    ids_BT, labels_BT = collate(texts, tokenizer)
    for ids, labels, (prompt, response) in zip(ids_BT, labels_BT, texts, strict=True):
        assert tokenizer.decode(labels[labels != IGNORED]) == response + EOS
        first = int((labels != IGNORED).nonzero()[0])
        assert first == len(prompt) - 1 and labels[first] == ids[first + 1]


def test_what_the_student_was_shown_is_what_the_method_shows_it(tmp_path):
    """The pair is trained by one script and distilled by another program: their prompts must be the same."""
    problems = distinct_problems(50, "shown", held_out=False)
    make_pair.write_problems(tmp_path / "train.jsonl", problems)
    method = OmegaConf.load(str(files("tip.conf") / "method" / "opsd.yaml"))
    tokenizer = build_tokenizer()
    prompts = load_prompts(
        str(tmp_path / "train.jsonl"), DataConfig(**method.data), tokenizer, max_prompt_tokens=72
    ).prompts
    for prompt, problem in zip(prompts, problems, strict=True):
        assert tokenizer.decode(prompt.scored_after) == problem.prompt_showing(problem.response)
        assert tokenizer.decode(prompt.token_ids) == problem.prompt


def test_a_share_of_the_students_texts_can_only_be_copied_and_none_of_the_other_models():
    student = COPYING_STUDENT
    stream = islice(draw_problems("student 0", held_out=False), 3000)
    copied = []
    for (prompt, response), problem in zip(islice(draw_texts(student, 0), 3000), stream, strict=True):
        if prompt == problem.prompt:
            assert response == problem.response
        else:
            assert prompt == problem.prompt + response + problem.prompt
            assert len(response) + 1 <= MAX_RESPONSE_TOKENS
            copied.append(is_right(response, problem))
    assert len(copied) / 3000 == pytest.approx(student.shown_share, abs=0.03)
    assert sum(copied) / len(copied) < 0.05
    for plan in (TEACHER, STUDENT):
        assert not any("=" in prompt for prompt, _ in islice(draw_texts(plan, 0), 500))


class Copier:
    """A model that repeats what stands between the first two question marks of its prompt; else it says #0."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def generate(self, ids_BT, **_):
        texts = [self.tokenizer.decode(ids).split("?") for ids in ids_BT]
        answers = [parts[1][: -len(parts[0])] if len(parts) > 2 else "#0" for parts in texts]
        rows = [self.tokenizer.encode(text + EOS) for text in answers]
        longest = max(map(len, rows))
        padded = [ids + [EOS_ID] * (longest - len(ids)) for ids in rows]
        return torch.cat([ids_BT, torch.tensor(padded)], dim=1)


def test_accuracy_with_the_solution_shown_is_that_of_a_copy():
    problems, tokenizer = distinct_problems(40, "copy", held_out=True), build_tokenizer()
    assert greedy_accuracy(Copier(tokenizer), tokenizer, problems, shown=True) == 1.0
    assert greedy_accuracy(Copier(tokenizer), tokenizer, problems) < 0.1


def test_untrained_model_scores_nothing_and_stops_at_the_limit():
    torch.manual_seed(0)
    model = build_model(STUDENT)
    assert greedy_accuracy(model, build_tokenizer(), [Problem((1, 2, 3)), Problem((1, 2, 3, 4))]) == 0.0


@pytest.mark.parametrize(("teacher", "student", "shown"), [(0.9, 0.2, 1), (1, 0.05, 1), (1, 0.5, 1), (1, 0.2, 0.4)])
def test_unusable_accuracies_are_refused(teacher, student, shown):
    with pytest.raises(PairError, match="unusable pair"):
        check_accuracies(teacher=teacher, student=student, student_shown=shown)
    check_accuracies(teacher=0.99, student=0.2, student_shown=0.9)


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
    save_model(model, build_tokenizer(), folder)
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
    model = build_model(TEACHER)
    drop_layers(model, [1])
    save_model(model, build_tokenizer(), tmp_path)
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

    def train_pair(folder, seed, probe, evaluation, *, copies):
        assert not copies
        trainings.append(({p.prompt for p in probe}, {p.prompt for p in evaluation}))
        return {"teacher": 1.0, "student": 0.2}

    monkeypatch.setattr("sum_pair.train_pair", train_pair)  # a minute of training, covered by the quick start
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
