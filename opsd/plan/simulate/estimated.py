"""Rates of workers on a GPU from its data sheet and the models' sizes: a rough estimate, which no one has measured.

A decode step reads the weights once and each sequence's keys and values, and computes two operations per weight and
sequence; scoring and prefill compute as much per token, training three times that, four with activation checkpointing.
"""

from __future__ import annotations

from dataclasses import dataclass

from opsd.plan.models import BYTES, ModelSizes
from opsd.plan.roles import Job
from opsd.plan.simulate.parts import Rates


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """NVIDIA's data sheets, SXM modules: bfloat16 without sparsity."""

    operations_per_s: float
    bytes_per_s: float  # of its memory


GPUS = {
    "a100": Gpu(operations_per_s=312e12, bytes_per_s=2.04e12),
    "h100": Gpu(operations_per_s=989e12, bytes_per_s=3.35e12),
    "h200": Gpu(operations_per_s=989e12, bytes_per_s=4.8e12),
    "b200": Gpu(operations_per_s=2250e12, bytes_per_s=8.0e12),
}
# Assumptions: what part of the data sheet is reached, and the seconds that no data sheet knows.
MEMORY_SHARE = 0.6
SCORE_SHARE = 0.4
LEARN_SHARE = 0.35
DECODE_OVERHEAD_S = 0.005  # of a decode step: scheduling, sampling, the log-probabilities of the candidates
SELECT_S_PER_TOKEN = 1e-6
# The one published figure: verl's weight sync of Qwen3-8B (16.4 GB in bfloat16) on 8 B200 takes 4.7 s of a step of
# 46.9 s (35.9 generation, 3.3 update), in the public benchmark of on-policy distillation of mid-2026.
SYNC_S_PER_BYTE = 4.7 / 16.4e9


def estimated_rates(job: Job, gpu: Gpu, *, response_tokens: float, context_tokens: float) -> Rates:
    """`response_tokens` of a step; `context_tokens` of a sequence while it is decoded, on average."""
    rollout, student = job.cfg.rollout, job.student
    bandwidth = gpu.bytes_per_s * MEMORY_SHARE * rollout.tensor_parallel_size
    generating = gpu.operations_per_s * SCORE_SHARE * rollout.tensor_parallel_size
    keys_and_values_s = context_tokens * student.cache_bytes_a_token(rollout.dtype) / bandwidth
    passes = 8 if job.cfg.learner.activation_checkpointing else 6
    return Rates(
        decode_step_s=DECODE_OVERHEAD_S + BYTES[rollout.dtype] * student.num_parameters / bandwidth,
        decode_sequence_s=keys_and_values_s + 2 * student.num_parameters / generating,
        prefill_tokens_per_s=generating / (2 * student.num_parameters),
        score_tokens_per_s=_scoring(job, gpu),
        learn_tokens_per_s=gpu.operations_per_s * LEARN_SHARE / (passes * student.num_parameters),
        head_share=_head_share(student),
        select_s=SELECT_S_PER_TOKEN * response_tokens,
        sync_s=SYNC_S_PER_BYTE * job.traffic.weight_bytes,
    )


def _scoring(job: Job, gpu: Gpu) -> float:
    [teacher] = job.teachers
    size = teacher.config.tensor_parallel_size
    return gpu.operations_per_s * SCORE_SHARE * size / (2 * teacher.model.num_parameters)


def _head_share(model: ModelSizes) -> float:
    """Of the weights that a token is multiplied with; the embedding is looked up."""
    computing = model.num_parameters if model.tied else model.num_parameters - model.num_embedding_parameters
    return model.num_embedding_parameters / computing
