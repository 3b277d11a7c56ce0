"""Each impossible setting is named in one sentence, and what the sentence advises is possible."""

import re
from dataclasses import replace

import pytest
import yaml

from opsd.config.lora import LoraConfig
from opsd.errors import ConfigError
from opsd.plan.cluster import ClusterConfig
from opsd.plan.refusals import refusals
from opsd.plan.table import plan_text
from tests.opsd.plan.jobs import gpu_job
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3

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
        ({"student": {"lora": LoraConfig(rank=16)}, "rollout": {"weight_transfer": "nccl"}},
         r"student\.lora\.rank=16 sends merged weights, through the object store alone"),
        ({"tools": {"build": "m:f"}, "data": {"grader": "math"},
          "teacher": {"backend": "http", "urls": ["http://127.0.0.1:1"], "num_workers": 1}},
         r"tools\.build with teacher\.backend=http needs eval\.teacher=false"),
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
        r"learner\.num_workers=1: a rank needs \d+\.\d GiB of a GPU's 40, \d+\.\d of it whatever the micro-batch: take "
        r"learner\.num_workers=",
        problem,
    )
    enough = int(re.search(r"take learner\.num_workers=(\d+)", problem)[1])
    assert ranks(enough) == [] and ranks(enough - 1) != []


def ways_of(problem):
    return problem.rpartition(": take ")[2].split(", or ")


def setting(way):
    """`learner.cpu_offload=true` as a section of gpu_job's."""
    sections = {}
    for part in way.split(" and "):
        name, value = part.split("=")
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = yaml.safe_load(value)
    return sections


def merged(sections, more):
    return {name: {**sections.get(name, {}), **more.get(name, {})} for name in {**sections, **more}}


@pytest.mark.parametrize(
    ("sections", "gib"),
    [
        ({"learner": {"num_workers": 1}}, 40),  # weights alone do not fit
        ({"learner": {"num_workers": 4, "activation_checkpointing": False}}, 40),
        ({"learner": {"num_workers": 4, "micro_batch_tokens": 65536}}, 24),
        ({"student": {"dtype": "float32"}, "learner": {"num_workers": 4, "activation_checkpointing": False}}, 80),
        ({"learner": {"num_workers": 1, "micro_batch_tokens": 65536}}, 16),
    ],
)
def test_each_way_that_a_learner_is_advised_fits_by_itself(sections, gib):
    def learner_problems(**settings):
        found = refusals(gpu_job(cluster=ClusterConfig(nodes=99, gib_per_gpu=gib), **settings))
        return [problem for problem in found if "a rank needs" in problem]

    [problem] = learner_problems(**sections)
    ways = ways_of(problem)
    assert ways and all(learner_problems(**merged(sections, setting(way))) == [] for way in ways), problem
    if sections["learner"]["num_workers"] == 1 and gib == 40:
        assert not any(way.startswith("learner.micro_batch_tokens") for way in ways)


def test_a_pair_of_two_tokenizer_families_is_refused_where_both_tokenizers_are_there(tmp_path):
    """And said not to be compared where one of them is not."""
    for name, alphabet in (("llama", "0123456789+="), ("qwen", "=+9876543210")):
        make_tiny_qwen3(tmp_path / name, tied=True, seed=0, eos_token_id=0)
        make_char_tokenizer(tmp_path / name, eos_token_id=0, alphabet=alphabet)
    small = {"rollout": {"max_response_tokens": 16, "num_candidates": 4}, "learner": {"num_workers": 4}}

    def job(student, teacher):
        return gpu_job(student={"path": str(student)}, teacher={"path": str(teacher), "top_k": 4}, **small)

    different = job(tmp_path / "llama", tmp_path / "qwen")
    [problem] = [problem for problem in refusals(different) if "tokenizer" in problem]
    assert problem.startswith("teacher.path: its tokenizer does not share the student's ids: ")
    assert not any("tokenizer" in problem for problem in refusals(job(tmp_path / "qwen", tmp_path / "qwen")))
    (tmp_path / "llama" / "tokenizer.json").unlink()
    (tmp_path / "llama" / "tokenizer_config.json").unlink()
    assert f"tokens    not compared: no tokenizer of {tmp_path}/llama here" in plan_text(different).splitlines()
    assert not any("tokenizer" in problem for problem in refusals(different))


@pytest.mark.parametrize(
    ("student", "teacher", "families"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-8B", ("Qwen", "Llama 3")),
        ("Qwen/Qwen2.5-1.5B", "meta-llama/Llama-3.1-8B-Instruct", ("Llama 3", "Qwen")),
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-14B-Instruct", None),  # of two sizes, padded
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", None),
    ],
)
def test_kept_models_of_two_tokenizer_families_are_refused_without_their_folders(student, teacher, families):
    found = [
        each for each in refusals(gpu_job(student={"path": student}, teacher={"path": teacher})) if "token" in each
    ]
    assert found == (
        []
        if families is None
        else [
            f"teacher.path: its tokenizer does not share the student's ids: {teacher} has {families[0]}'s, {student} "
            f"{families[1]}'s"
        ]
    )


def test_a_teacher_too_large_for_a_gpu_is_told_its_tensor_parallel_size():
    def seventy(**settings):
        path = {"path": "meta-llama/Llama-3.3-70B-Instruct", "num_workers": 1, **settings}
        student = {"path": "meta-llama/Llama-3.1-8B-Instruct"}
        return refusals(gpu_job(student=student, teacher=path, cluster=ClusterConfig(nodes=4)))

    [problem] = seventy()
    assert problem.startswith("teacher.gpu_memory_utilization=0.9 of 80 GiB leaves 0.0 GiB for keys and values")
    size = int(re.search(r"take teacher\.tensor_parallel_size=(\d+)", problem)[1])
    assert seventy(tensor_parallel_size=size) == []
    assert seventy(tensor_parallel_size=size // 2) != []


def test_a_share_that_leaves_no_room_for_the_scores_is_refused():
    [problem] = refusals(gpu_job(teacher={"gpu_memory_utilization": 1.0}))
    assert problem.startswith("teacher.gpu_memory_utilization=1: an engine needs 81.5 GiB of a GPU's 80")


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
