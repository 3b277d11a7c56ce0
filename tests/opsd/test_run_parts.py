"""The words about what starts before the first step, which can take minutes."""

from dataclasses import replace

from opsd.config.engine import TeacherConfig
from opsd.run_parts import loaded_models
from tests.opsd.plan.jobs import gpu_job


def test_every_role_says_what_it_loads():
    assert loaded_models(gpu_job().cfg) == {
        "rollout": "2 vllm engines with Qwen/Qwen3-4B in bfloat16",
        "teacher": "2 vllm engines with Qwen/Qwen3-8B in bfloat16",
        "learner": "4 ranks with Qwen/Qwen3-4B, computing in bfloat16",
    }


def test_one_of_a_kind_and_a_teacher_elsewhere():
    cfg = gpu_job(rollout={"num_workers": 1}, learner={"num_workers": 1}).cfg
    served = TeacherConfig(backend="http", urls=["http://one:8000", "http://two:8000"])
    words = loaded_models(replace(cfg, teacher=served))
    assert words["rollout"].startswith("1 vllm engine with") and words["learner"].startswith("1 rank with")
    assert words["teacher"] == "served at http://one:8000, http://two:8000"
