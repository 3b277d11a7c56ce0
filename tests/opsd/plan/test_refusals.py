"""Each impossible setting is named in one sentence, and what the sentence advises is possible."""

import re
from dataclasses import replace

import pytest

from opsd.errors import ConfigError
from opsd.plan.cluster import ClusterConfig
from opsd.plan.refusals import refusals
from tests.opsd.plan.jobs import gpu_job

FOUR_GPUS = ClusterConfig(gpus_per_node=4)


def test_the_recipe_as_it_stands_is_not_refused():
    assert refusals(gpu_job()) == []


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"teacher": {"top_k": 200_000}}, r"teacher\.top_k must be at most the shared vocabulary's 151936 tokens"),
        ({"rollout": {"num_candidates": 151_937}}, r"rollout\.num_candidates must be at most"),
        ({"learner": {"micro_batch_tokens": 4096}}, r"learner\.micro_batch_tokens \(4096\) must hold at least"),
        ({"loss": {"support": "union"}, "teacher": {"score_candidates": False}},
         r"loss\.support=union needs the teacher's scores"),
        ({"rollout": {"max_response_tokens": 40_960}, "learner": {"micro_batch_tokens": 65_536}},
         r"rollout\.max_response_tokens=40960 leaves no room for a prompt in a context of 40960"),
        ({"rollout": {"tensor_parallel_size": 3, "num_workers": 1}, "teacher": {"num_workers": 1}},
         r"rollout\.tensor_parallel_size=3 does not divide the 32 attention heads \(8 of keys\) of Qwen/Qwen3-4B: use "
         r"one of 1, 2, 4, 8, 16, 32"),
        ({"teacher": {"num_workers": 3}},
         r"9 GPUs are needed \(rollout 2, teacher 3, learner 4\), the cluster has 8 \(cluster\.nodes"),
    ],
)  # fmt: skip
def test_an_impossible_setting_is_named(sections, said):
    [problem] = refusals(gpu_job(**sections))
    assert re.search(said, problem)


def test_heads_that_processes_cannot_share_are_refused_on_a_cpu_too():
    def problems(size):
        job = gpu_job(rollout={"tensor_parallel_size": size}, cluster=ClusterConfig(host_gib=1e6))
        return refusals(replace(job, device="cpu"))

    assert problems(2) == []
    [problem] = problems(3)
    assert problem.startswith("rollout.tensor_parallel_size=3 does not divide the 32 attention heads")


def test_an_engine_does_not_reach_over_nodes():
    job = gpu_job(
        teacher={"tensor_parallel_size": 8, "num_workers": 1}, cluster=ClusterConfig(nodes=4, gpus_per_node=4)
    )
    [problem] = refusals(job)
    assert problem.startswith("teacher.tensor_parallel_size=8 is more than a node's 4 GPUs")


def test_a_learner_that_does_not_fit_is_told_how_many_ranks_do():
    def ranks(number):
        return refusals(gpu_job(learner={"num_workers": number}, cluster=ClusterConfig(gib_per_gpu=40)))

    [problem] = ranks(1)
    assert re.match(
        r"learner\.num_workers=1: a rank needs \d+\.\d GiB of a GPU's 40: take learner\.num_workers=", problem
    )
    enough = int(re.search(r"take learner\.num_workers=(\d+)", problem)[1])
    assert ranks(enough) == [] and ranks(enough - 1) != []


def test_a_teacher_too_large_for_a_gpu_is_told_its_tensor_parallel_size():
    def seventy(**settings):
        path = {"path": "meta-llama/Llama-3.3-70B-Instruct", "num_workers": 1, **settings}
        return refusals(gpu_job(teacher=path, cluster=ClusterConfig(nodes=2)))

    [problem] = seventy()
    assert problem.startswith("teacher.gpu_memory_utilization=0.9 of 80 GiB leaves 0.0 GiB for keys and values")
    size = int(re.search(r"take teacher\.tensor_parallel_size=(\d+)", problem)[1])
    assert seventy(tensor_parallel_size=size) == []
    assert seventy(tensor_parallel_size=size // 2) != []


def test_a_share_that_leaves_no_room_for_the_scores_is_refused():
    [problem] = refusals(gpu_job(teacher={"gpu_memory_utilization": 1.0}))
    assert problem.startswith("teacher.gpu_memory_utilization=1: an engine needs 81.0 GiB of a GPU's 80")


def test_colocated_roles_share_gpus_and_their_memory():
    def colocated(share, **learner):
        sections = {name: {"gpu_memory_utilization": share, "num_workers": 4} for name in ("rollout", "teacher")}
        return refusals(gpu_job(placement={"mode": "colocated"}, learner=learner, cluster=FOUR_GPUS, **sections))

    assert colocated(0.35) == []
    [problem] = colocated(0.45)
    assert problem.startswith("placement.mode=colocated: a GPU needs") and "lower rollout.gpu_memory_utiliz" in problem
    [problem] = colocated(0.35, num_workers=8)
    assert problem.startswith("8 GPUs are needed (rollout 4, teacher 4, learner 8), the cluster has 4")


def test_a_host_without_the_memory_is_refused():
    job = replace(gpu_job(cluster=ClusterConfig(host_gib=24)), device="cpu")
    assert any(
        "GiB together, the host has 24.0 (cluster.host_gib); the largest part is learner-0..3" in p
        for p in refusals(job)
    )


@pytest.mark.parametrize(
    ("name", "value"), [("nodes", 0), ("gpus_per_node", 0), ("gib_per_gpu", 0.0), ("host_gib", -1.0)]
)
def test_a_cluster_of_nothing_is_refused(name, value):
    with pytest.raises(ConfigError, match=rf"cluster\.{name} must be"):
        ClusterConfig(**{name: value})
