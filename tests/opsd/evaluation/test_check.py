"""What an evaluation refuses before it starts Ray or loads a weight, and what it plans."""

import json

import pytest
import yaml

from opsd.config.run import compose_config
from opsd.errors import ConfigError, DataError
from opsd.evaluate import evaluate
from opsd.evaluation.config import EvaluateConfig
from opsd.evaluation.models import check, named_paths
from opsd.evaluation.plan import plan
from tests.opsd.agents.agent_models import BUILD, make_agent_model
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a finished run with that model, a run without a student, and a file of three problems."""
    root = tmp_path_factory.mktemp("check")
    for name in ("model", "run/student"):
        make_tiny_qwen3(root / name, tied=True, seed=0, eos_token_id=0)
        make_char_tokenizer(root / name, eos_token_id=0)
    (root / "unfinished").mkdir()
    for name in ("run", "unfinished"):
        paths = {"teacher": {"path": str(root / "model")}, "student": {"path": str(root / "model")}}
        (root / name / "config.yaml").write_text(yaml.safe_dump(paths))
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(3)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def configure(folder, **settings):
    given = {"output_dir": str(folder / "out"), "data": {"paths": [str(folder / "sums.jsonl")]}, **settings}
    return compose_config(given, EvaluateConfig)


def test_a_run_gives_three_models_and_a_runs_folder_its_student(folder):
    cfg = configure(folder, run=str(folder / "run"), models={"again": str(folder / "run")})
    student = str(folder / "run" / "student")
    model = str(folder / "model")
    assert named_paths(cfg) == {"teacher": model, "before": model, "after": student, "again": student}


def test_the_first_problems_of_every_file_are_taken_and_named_by_their_file(folder):
    (folder / "named.jsonl").write_text('{"prompt": "1", "answer": "2", "data_source": "mine"}')
    paths = [str(folder / "sums.jsonl"), str(folder / "named.jsonl")]
    [model] = check(configure(folder, models={"a": str(folder / "model")}, data={"paths": paths, "num_problems": 2}))
    assert [(p.data_source, p.index, p.answer) for p in model.prompts] == [
        ("sums", 0, "1"), ("sums", 1, "2"), ("mine", 0, "2"),
    ]  # fmt: skip
    assert model.max_model_tokens == 4 + 512


@pytest.fixture(scope="module")
def with_tools(folder):
    """A model whose template shows tools, and rows of which the second file's cannot be opened."""
    make_agent_model(folder / "agent", seed=0)
    for name, more in (("good", {"start": 7}), ("bad", {"unopenable": True})):
        row = {"prompt": [{"role": "user", "content": "?"}], "answer": "1", **more}
        (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def ask_with_tools(folder, *, model="agent", files=("good",), **tools):
    data = {"paths": [str(folder / f"{name}.jsonl") for name in files]}
    return configure(folder, models={"a": str(folder / model)}, data=data, tools={"build": BUILD, **tools})


def test_a_model_with_tools_sees_them_in_its_prompts_and_keeps_the_rows(with_tools):
    [model] = check(ask_with_tools(with_tools, max_turns=2))
    [prompt] = model.prompts
    assert prompt.text.startswith("(add)(later)") and prompt.row["start"] == 7
    assert (model.agents.path, model.agents.tools.max_turns) == (str(with_tools / "agent"), 2)
    assert model.agents.stop_ids == model.vocabulary.stop_ids and len(model.agents.stop_ids) == 9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"files": ("good", "bad")}, "bad.jsonl, row 1 cannot be opened: open raised RuntimeError: no such world"),
        ({"files": ("sums",)}, "sums.jsonl, line 1: tools.build needs a chat template to show tools"),
        ({"model": "model"}, "tools.build: the chat template of"),
        ({"build": "tests.opsd.agents.some_tools:build_nothing"}, "RuntimeError: the service is down"),
    ],
)
def test_what_is_wrong_with_tools_is_one_line_before_anything_starts(with_tools, settings, said):
    with pytest.raises((ConfigError, DataError)) as caught:
        check(ask_with_tools(with_tools, **settings))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_heads_that_an_engines_processes_cannot_share_are_refused_and_planned_for(folder):
    cfg = configure(folder, models={"a": str(folder / "model")}, engine={"tensor_parallel_size": 3})
    for look in (check, plan):
        with pytest.raises(ConfigError, match=r"engine\.tensor_parallel_size=3 does not divide the 2 attention heads"):
            look(cfg)
    cfg.engine.tensor_parallel_size = 2
    assert len(check(cfg)) == 1 and plan(cfg)


def test_the_plan_has_sizes_and_counts(folder):
    """Keys and values of 2 layers, 2 heads, 32 numbers a head, 4 bytes each: 1 KiB for each of 1024 tokens."""
    models = {"a": str(folder / "model"), "kept": "Qwen/Qwen3-4B"}
    cfg = configure(folder, models=models, samples_per_problem=2, max_response_tokens=10)
    *_, first, second = plan(cfg).splitlines()
    assert first.endswith(f"| {folder}/model | 0.1 M | 0.00 | 1.0 | 3 | 6 | 60 |")
    assert second.startswith("| kept | Qwen/Qwen3-4B | 4,022.5 M | 14.98 |")  # as published: 4.0 B, tied
    assert not (folder / "out").exists()


def test_a_plan_needs_no_data_and_refuses_what_an_evaluation_would(folder):
    cfg = configure(folder, models={"a": "Qwen/Qwen3-4B"}, data={"paths": []})
    assert plan(cfg).endswith("| – | – | – |")
    with pytest.raises(ConfigError, match="max_response_tokens=1024 leaves no room for a prompt in models.a's context"):
        plan(configure(folder, models={"a": str(folder / "model")}, max_response_tokens=1024))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "there is nothing to evaluate: set +models.NAME=FOLDER"),
        ({"models": {"a": "{}/nowhere"}}, "nowhere: there is no model here"),
        ({"models": {"a/b": "{}/model"}}, "models: a name is letters, digits"),
        ({"models": {"a": "{}/unfinished"}}, "unfinished: this run has no student yet"),
        ({"run": "{}/model"}, "model: there is no run here"),
        ({"run": "{}/run", "models": {"after": "{}/model"}}, "gives a model of this name already"),
        (
            {"models": {"a": "{}/model"}, "max_response_tokens": 1024},
            "leaves no room for a prompt in models.a's context",
        ),
        ({"models": {"a": "{}/model"}, "temperature": 0}, "temperature=0 gives one answer 4 times"),
        ({"models": {"a": "{}/model"}, "output_dir": "{}/run"}, "holds a run: choose another folder"),
        ({"models": {"a": "{}/model"}, "output_dir": "{}/sums.jsonl"}, "sums.jsonl is a file"),
        ({"models": {"a": "{}/model"}, "data": {"paths": []}}, "data.paths is empty"),
        ({"models": {"a": "{}/model"}, "data": {"paths": ["{}/nowhere"]}}, "nowhere: there is no such file"),
        (
            {"models": {"a": "{}/model"}, "data": {"paths": ["{}/sums.jsonl"], "prompt_key": "text"}},
            "sums.jsonl, line 1: expected an object with 'text', got prompt, answer",
        ),
    ],
)
def test_a_mistake_is_refused_with_its_setting(folder, settings, said):
    settings = json.loads(json.dumps(settings).replace("{}/", f"{folder}/"))
    with pytest.raises((ConfigError, DataError)) as caught:
        evaluate(configure(folder, **settings))
    assert said in str(caught.value)
    assert not (folder / "out").exists()


def test_an_earlier_evaluation_is_kept_unless_asked(folder, tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds another evaluation"):
        evaluate(configure(folder, models={"a": str(folder / "model")}, output_dir=str(tmp_path)))
    assert (tmp_path / "summary.json").exists()
