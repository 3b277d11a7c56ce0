"""What a recipe makes of its environment: settings, a plan, or one sentence."""

import stat

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore

from opsd.config.run import compose_config
from tests.recipes.recipe import DISTILLING, PAPERS, start, start_here
from tip.config import SelectorConfig, TipRunConfig


@pytest.fixture
def printer(tmp_path):
    """An 'interpreter' that prints its arguments, a line each."""
    script = tmp_path / "printer.sh"
    script.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


@pytest.fixture
def places(tmp_path):
    """Folders with just the files that a recipe looks for."""
    for name, files in (
        ("student", ["config.json"]),
        ("teacher", ["config.json"]),
        ("data", ["train.jsonl", "test.jsonl"]),
    ):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    return {
        "MODEL_PATH": tmp_path / "student",
        "TEACHER_MODEL_PATH": tmp_path / "teacher",
        "DATA_DIR": tmp_path / "data",
    }


@pytest.fixture
def settings_of(printer, places):
    def config(recipe, *settings, **variables):
        """The run that `recipe` would start."""
        where = dict(places)
        if recipe == "opsd_self_distill.sh":
            del where["TEACHER_MODEL_PATH"]
        process = start(recipe, *settings, **{**where, "OPSD_PYTHON": printer, **variables})
        assert process.returncode == 0, process.stderr
        _, _, program, *overrides = process.stdout.splitlines()  # after -P -m
        assert program == "tip.train"
        ConfigStore.instance().store(name="schema", node=TipRunConfig)
        with initialize_config_module("tip.conf", version_base=None):
            return compose_config(compose("tip", overrides=overrides), TipRunConfig)

    return config


@pytest.mark.parametrize("recipe", DISTILLING)
def test_every_recipe_has_the_papers_hyper_parameters(settings_of, places, recipe):
    cfg = settings_of(recipe)
    assert cfg.data.max_prompt_tokens == 2048 and cfg.data.samples_per_prompt == 16
    assert (cfg.rollout.max_response_tokens, cfg.rollout.temperature, cfg.rollout.top_p) == (8192, 1.0, 1.0)
    assert (cfg.learner.learning_rate, cfg.learner.schedule) == (3e-7 if "llama" in recipe else 1e-6, "cosine")
    assert (cfg.device, cfg.num_epochs, cfg.data.grader) == ("cuda", 1, "math")
    assert cfg.student.path == str(places["MODEL_PATH"])
    assert cfg.data.train_path == f"{places['DATA_DIR']}/train.jsonl"
    assert cfg.teacher.path == str(places["MODEL_PATH" if "self" in recipe else "TEACHER_MODEL_PATH"])
    assert cfg.learner.micro_batch_tokens >= 2048 + 8192
    no_thinking = {} if recipe in PAPERS[1:] else {"enable_thinking": False}
    assert cfg.data.template_options == no_thinking


@pytest.mark.parametrize("recipe", PAPERS)
def test_the_papers_loss_is_reverse_kl_on_soft_or(settings_of, recipe):
    cfg = settings_of(recipe)
    assert cfg.loss.divergence == "reverse_kl" and cfg.selector == SelectorConfig(score="soft_or", ratio=0.5)


@pytest.mark.parametrize(
    ("arm", "selector"),
    [
        ("all", SelectorConfig(name="all", ratio=1.0)),
        *((f"{score}{cut}", SelectorConfig(score=score, ratio=int(cut) / 100)) for score, cut in [
            ("entropy", "50"), ("entropy", "20"), ("entropy", "10"), ("soft_or", "50"), ("soft_or", "20"),
            ("divergence", "50"), ("divergence", "10"), ("bottom", "50"), ("random", "50"),
        ]),
        ("q3_20", SelectorConfig(score="q3", ratio=0.2)),
        ("q3_10", SelectorConfig(score="q3", ratio=0.1)),
    ],
)  # fmt: skip
def test_an_arm_is_a_selector(settings_of, arm, selector):
    cfg = settings_of("qwen3_8b_to_4b.sh", ARM=arm)
    assert cfg.selector == selector
    assert cfg.output_dir == f"outputs/qwen3_8b_to_4b-{arm}"


@pytest.mark.parametrize(
    ("recipe", "variables", "divergence"),
    [
        ("todi.sh", {}, "todi"),
        ("kdrl.sh", {}, "kdrl"),
        ("kdrl.sh", {"FORM": "kdrl_mask"}, "kdrl_mask"),
        ("adakd.sh", {}, "reverse_kl"),
    ],
)
def test_a_method_is_its_own(settings_of, recipe, variables, divergence):
    cfg = settings_of(recipe, **variables)
    assert cfg.loss.divergence == divergence
    if recipe == "adakd.sh":
        assert (cfg.selector.schedule, cfg.selector.score, cfg.adjust) == (
            "loss_driven",
            "hellinger",
            {"temperature": {}},
        )


def test_self_distillation_shows_the_teacher_the_solution(settings_of):
    cfg = settings_of("opsd_self_distill.sh", SOLUTION_KEY="worked")
    assert "{prompt}" in cfg.data.teacher_template and "{solution}" in cfg.data.teacher_template
    assert cfg.data.solution_key == "worked"


def test_upstreams_variables_become_settings(settings_of, tmp_path):
    cfg = settings_of(
        "qwen3_8b_to_4b.sh", TRAIN_BATCH_SIZE=8, ROLLOUT_N=2, MAX_PROMPT_LENGTH=100, MAX_RESPONSE_LENGTH=200,
        TEMPERATURE=0.8, TOP_P=0.9, LEARNING_RATE="2e-5", TOTAL_EPOCHS=3, SAVE_FREQ=7, TEST_FREQ=9, TP_SIZE=2,
        GPU_MEMORY_UTIL=0.5, OPD_LOSS_TYPE="jsd", OPD_REWARD_BETA=0.25, ENABLE_THINKING="True", DEVICE="cpu",
        OUTPUT_ROOT=tmp_path / "runs", RUN_ID="mine",
    )  # fmt: skip
    assert (cfg.data.prompts_per_step, cfg.data.samples_per_prompt, cfg.data.max_prompt_tokens) == (8, 2, 100)
    assert (cfg.rollout.max_response_tokens, cfg.rollout.temperature, cfg.rollout.top_p) == (200, 0.8, 0.9)
    assert (cfg.learner.learning_rate, cfg.num_epochs, cfg.checkpoint.every, cfg.eval.every) == (2e-5, 3, 7, 9)
    assert (cfg.rollout.tensor_parallel_size, cfg.rollout.gpu_memory_utilization) == (2, 0.5)
    assert (cfg.loss.divergence, cfg.adjust, cfg.device) == ("jsd", {"reward": {"beta": 0.25}}, "cpu")
    assert cfg.data.template_options == {"enable_thinking": True}
    assert cfg.output_dir == str(tmp_path / "runs" / "mine")


def test_steps_replace_epochs_and_an_override_comes_last(settings_of):
    cfg = settings_of("todi.sh", "learner.num_workers=1", "selector=entropy", TOTAL_TRAINING_STEPS=5)
    assert (cfg.num_steps, cfg.num_epochs, cfg.learner.num_workers) == (5, 0, 1)
    assert cfg.selector.score == "entropy"


def test_without_a_test_file_the_evaluation_is_on_a_validation_set(settings_of, places):
    (places["DATA_DIR"] / "test.jsonl").rename(places["DATA_DIR"] / "val_dapo.parquet")
    assert settings_of("todi.sh").data.eval_path == f"{places['DATA_DIR']}/val_dapo.parquet"


def test_paths_are_the_callers_and_parquet_comes_first(printer, places, tmp_path):
    (tmp_path / "data" / "train.parquet").touch()
    relative = {name: path.name for name, path in places.items()}
    process = start("todi.sh", cwd=tmp_path, OPSD_PYTHON=printer, OUTPUT_ROOT="runs", **relative)
    assert f"student.path='{tmp_path}/student'" in process.stdout
    assert f"data.train_path='{tmp_path}/data/train.parquet'" in process.stdout
    assert f"data.eval_path='{tmp_path}/data/test.jsonl'" in process.stdout
    assert f"output_dir='{tmp_path}/runs/todi'" in process.stdout


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"DATA_DIR": ""}, "DATA_DIR: set it to a folder with train.parquet or train.jsonl"),
        (
            {"DATA_DIR": "/no/such/folder"},
            "todi.sh: DATA_DIR=/no/such/folder has no train.parquet and no train.jsonl",
        ),
        ({"MODEL_PATH": "Qwen/Qwen3-4B"}, "todi.sh: MODEL_PATH=Qwen/Qwen3-4B is no folder with a config.json"),
        ({"TEACHER_MODEL_PATH": "/none"}, "todi.sh: TEACHER_MODEL_PATH=/none is no folder with a config.json"),
        ({"ARM": "half"}, "todi.sh: ARM=half must be all or a score and two digits of per cent"),
    ],
)
def test_what_is_missing_is_named_in_one_sentence(printer, places, changed, said):
    process = start("todi.sh", **{**places, "OPSD_PYTHON": printer, **changed})
    assert process.returncode == 1 and process.stdout == ""
    assert said in process.stderr and len(process.stderr.splitlines()) == 1


def test_a_variable_that_changes_nothing_is_named(printer, places):
    process = start("todi.sh", **places, OPSD_PYTHON=printer, PPO_MINI_BATCH_SIZE=64, VAL_N=16)
    assert process.returncode == 0
    assert process.stderr.splitlines() == [
        "todi.sh: PPO_MINI_BATCH_SIZE is not followed: a step is one optimiser step on all of its answers",
        "todi.sh: VAL_N is not followed: a training evaluates greedily; recipes/eval.sh samples",
    ]


@pytest.mark.parametrize("recipe", [*DISTILLING, "quickstart.sh", "agent_quickstart.sh", "smollm2.sh"])
def test_plan_only_prints_a_table_without_models_data_or_network(recipe):
    process = start_here(recipe, PLAN_ONLY=1)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    rows = [line.split() for line in process.stdout.splitlines()]
    named = {row[0].partition("-")[0]: row for row in rows if row}
    assert {"role", "driver", "rollout", "teacher", "learner", "payload", "steps"} <= named.keys()
    for role in ("rollout", "teacher", "learner"):
        *parts, total = map(float, named[role][2:10])
        assert sum(parts) == pytest.approx(total, abs=0.05) and total > 0


@pytest.mark.parametrize("recipe", [*DISTILLING, "quickstart.sh", "agent_quickstart.sh", "smollm2.sh"])
def test_plan_only_of_every_recipe_refuses_more_log_probabilities_than_tokens(recipe):
    process = start_here(recipe, "teacher.top_k=1000000", PLAN_ONLY=1)
    assert process.returncode == 1
    assert process.stderr.startswith("error: teacher.top_k must be at most the shared vocabulary's")


@pytest.mark.slow
def test_plan_only_with_an_impossible_field_is_one_sentence():
    """In a process of its own, as a user starts it."""
    process = start("llama3_70b_to_8b.sh", "teacher.tensor_parallel_size=3", "learner.num_workers=4", PLAN_ONLY=1)
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("error: teacher.tensor_parallel_size=3 does not divide the 64 attention heads")


def test_plan_only_names_a_misspelt_field():
    process = start_here("quickstart.sh", "teacher.topk=3", PLAN_ONLY=1)
    assert process.returncode == 1 and "topk" in process.stderr and "Traceback" not in process.stderr
