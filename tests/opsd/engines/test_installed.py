"""vLLM that is not installed is one line, before anything is loaded, wherever an engine of it is asked for."""

import pytest

import opsd.engines.installed
from opsd.config.engine import EngineConfig, RolloutConfig, TeacherConfig
from opsd.config.run import DataConfig, RunConfig, StudentConfig
from opsd.engines.installed import require_vllm
from opsd.errors import ConfigError
from opsd.evaluate import evaluate
from opsd.evaluation.config import EvaluateConfig, EvaluationData
from opsd.preflight import check
from opsd.teacher.server.config import ServerConfig
from opsd.teacher.server.program import serve


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch):
    monkeypatch.setattr(opsd.engines.installed, "find_spec", lambda name: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def run_config(rollout="vllm", teacher="vllm", **by_source):
    return RunConfig(
        output_dir="never-made",
        device="cpu",
        student=StudentConfig(path="no-model"),
        data=DataConfig(train_path="none", eval_path="none"),
        rollout=RolloutConfig(backend=rollout),
        teacher=TeacherConfig(backend=teacher, path="no-model", by_source=by_source),
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (run_config(), "rollout.backend=vllm teacher.backend=vllm: vLLM is not installed here"),
        (run_config(), "or set rollout.backend=transformers teacher.backend=transformers"),
        (run_config(teacher="transformers"), "or set rollout.backend=transformers"),
        (run_config(rollout="transformers"), "teacher.backend=vllm: vLLM is not installed here"),
        (
            run_config("transformers", "transformers", maths={"path": "other", "backend": "vllm"}),
            "teacher.by_source.maths.backend=vllm: vLLM is not installed",
        ),
    ],
)
def test_a_training_is_refused_before_its_models_are_looked_at(config, said):
    with pytest.raises(ConfigError) as caught:
        check(config)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_without_vllm_engines_gets_as_far_as_its_models():
    with pytest.raises(ConfigError, match="student.path=no-model: there is no model here"):
        check(run_config("transformers", "transformers"))


def test_a_driver_in_a_cluster_leaves_it_to_the_nodes(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(ConfigError, match="student.path=no-model: there is no model here"):
        check(run_config())


def test_an_evaluation_is_refused_alike():
    cfg = EvaluateConfig(output_dir="never-made", device="cpu", models={"a": "none"}, data=EvaluationData(paths=["x"]))
    with pytest.raises(ConfigError, match="^engine.backend=vllm: vLLM is not installed here: .* engine.backend=trans"):
        evaluate(cfg)


def test_a_teachers_server_is_refused_alike():
    with pytest.raises(ConfigError, match="^teacher.backend=vllm: vLLM is not installed here"):
        serve(ServerConfig(teacher=TeacherConfig(path="no-model"), host="127.0.0.1"))


def test_installed_it_is_no_matter(monkeypatch):
    monkeypatch.setattr(opsd.engines.installed, "find_spec", lambda name: object())
    require_vllm({"rollout": EngineConfig().backend})
