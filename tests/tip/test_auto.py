"""dtype=auto is decided by the device, once; what a user names stays."""

import pytest
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore

from opsd.config.auto import planned_device, with_dtypes
from opsd.config.run import RunConfig, compose_config
from opsd.evaluation.config import EvaluateConfig
from opsd.plan.cluster import ClusterConfig
from opsd.plan.program import planned_job
from opsd.teacher.server.config import ServerConfig
from opsd.teacher.sources import teachers_by_source
from tip.config import TipRunConfig

RUN = ["output_dir=o", "student.path=Qwen/Qwen3-4B", "teacher.path=Qwen/Qwen3-8B", "data.train_path=a",
       "data.eval_path=b"]  # fmt: skip


def composed(module, name, config_class, *overrides):
    schema = "teacher_server_schema" if config_class is ServerConfig else "schema"
    ConfigStore.instance().store(name=schema, node=config_class)
    with initialize_config_module(module, version_base=None):
        return compose_config(compose(name, overrides=list(overrides)), config_class)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
@pytest.mark.parametrize(
    ("module", "name", "config_class"), [("opsd.conf", "run", RunConfig), ("tip.conf", "tip", TipRunConfig)]
)
def test_a_runs_dtypes_are_those_of_the_device(module, name, config_class, device, dtype):
    cfg = with_dtypes(composed(module, name, config_class, *RUN), device)
    assert [section.dtype for section in (cfg.student, cfg.rollout, cfg.teacher)] == [dtype] * 3


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_those_of_an_evaluation_and_of_a_server_too(device, dtype):
    evaluation = ["output_dir=o", "+models.m=f", "data.paths=[p]"]
    cfg = with_dtypes(composed("opsd.conf", "evaluate", EvaluateConfig, *evaluation), device)
    assert cfg.engine.dtype == dtype
    cfg = with_dtypes(composed("opsd.conf", "teacher_server", ServerConfig, "teacher.path=t"), device)
    assert cfg.teacher.dtype == dtype


def test_what_is_named_stays_and_a_source_follows_its_section():
    named = ["student.dtype=float32", "teacher.dtype=float32", "+teacher.by_source={a: x, b: {path: y, dtype: auto}}"]
    cfg = with_dtypes(composed("opsd.conf", "run", RunConfig, *RUN, *named), "cuda")
    assert (cfg.student.dtype, cfg.rollout.dtype) == ("float32", "bfloat16")
    dtypes = {source: teacher.dtype for source, teacher in teachers_by_source(cfg.teacher).items()}
    assert dtypes == {"": "float32", "a": "float32", "b": "bfloat16"}


def test_the_plan_of_a_gpu_run_counts_bfloat16_on_a_machine_without_gpus():
    cfg = composed("opsd.conf", "run", RunConfig, *RUN, "device=cuda")
    assert planned_device("cuda") == "cuda"
    job = planned_job(cfg, ClusterConfig())
    assert job.cfg.student.dtype == job.teachers[0].config.dtype == "bfloat16"
    assert job.traffic.weight_bytes == 2 * job.student.num_parameters
