"""A planned run for tests: Qwen3-8B to Qwen3-4B on eight GPUs of 80 GiB, with whatever a test changes."""

from dataclasses import replace

from opsd.config.engine import RolloutConfig, TeacherConfig
from opsd.config.loss import LossConfig
from opsd.config.run import DataConfig, LearnerConfig, RunConfig, StudentConfig
from opsd.plan.cluster import ClusterConfig
from opsd.plan.program import planned_job


def gpu_job(*, cluster=None, **sections):
    """`sections`: dicts of settings by section, such as learner={"num_workers": 2}."""
    cfg = RunConfig(
        output_dir="out",
        device="cuda",
        student=StudentConfig(path="Qwen/Qwen3-4B", dtype="bfloat16"),
        data=DataConfig(train_path="train.jsonl", eval_path="test.jsonl", prompts_per_step=16, samples_per_prompt=16),
        rollout=RolloutConfig(max_response_tokens=8192, dtype="bfloat16", num_workers=2),
        teacher=TeacherConfig(path="Qwen/Qwen3-8B", dtype="bfloat16", num_workers=2),
        learner=LearnerConfig(num_workers=4, activation_checkpointing=True),
        loss=LossConfig(payload="logprobs"),
    )
    for name, settings in sections.items():
        cfg = replace(cfg, **{name: replace(getattr(cfg, name), **settings)})
    return planned_job(cfg, cluster or ClusterConfig())
