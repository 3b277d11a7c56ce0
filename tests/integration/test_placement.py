"""Who sits where: Ray's own book-keeping of GPUs, which needs no GPU to be there."""

import os

import pytest
import ray

from opsd.cluster.placement import Placement
from opsd.cluster.ray import start_actor
from opsd.config.engine import RolloutConfig, TeacherConfig
from opsd.config.placement import PlacementConfig
from opsd.config.run import LearnerConfig, RunConfig
from opsd.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def four_gpus():
    ray.init(address="local", num_cpus=1, num_gpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def take():
    """(placement, role, number, GPUs of each) -> seats, which are given back after the test."""
    taken = []

    def seats(*arguments):
        taken.extend(found := arguments[0].seats(*arguments[1:]))
        return found

    yield seats
    groups = {seat["scheduling_strategy"].placement_group.id: seat["scheduling_strategy"] for seat in taken}
    for strategy in groups.values():
        ray.util.remove_placement_group(strategy.placement_group)


def gpus_of(seats):
    """The GPUs that an actor on each seat sees."""

    class Sitter:  # it travels as it is: were it found by its module's name, each actor would import this file
        def gpus(self):
            return os.environ["CUDA_VISIBLE_DEVICES"]

    actors = [start_actor(Sitter, f"sitter-{i}", num_gpus=0, environment={}, seat=s) for i, s in enumerate(seats)]
    found = ray.get([actor.gpus.remote() for actor in actors], timeout=120)
    for actor in actors:
        ray.kill(actor)
    return found


def config(mode="separate", **settings):
    return RunConfig(
        device="cuda",
        placement=PlacementConfig(mode=mode, wait_s=1.0, **settings),
        rollout=RolloutConfig(num_workers=2),
        teacher=TeacherConfig(num_workers=1),
        learner=LearnerConfig(num_workers=2),
    )


def test_separate_roles_have_gpus_of_their_own(take):
    placement = Placement(config(), "cuda")
    [teacher, *learners] = gpus_of([*take(placement, "teacher", 1, 2), *take(placement, "learner", 2, 1)])
    assert sorted([*teacher.split(","), *learners]) == ["0", "1", "2", "3"]


def test_colocated_roles_share_each_gpu_one_of_each(take):
    placement = Placement(config("colocated"), "cuda")
    found = gpus_of([seat for role, n in (("rollout", 2), ("learner", 2), ("teacher", 1))
                     for seat in take(placement, role, n, 1)])  # fmt: skip
    first, second = found[:2]
    assert first != second
    assert found == [first, second, first, second, first]


@pytest.mark.parametrize(
    ("nodes", "num_actors", "gpus_each", "said"),
    [
        ("", 3, 2, "no room for rollout: 3 x 2 GPUs within placement.wait_s=1; the Ray cluster has .*: 4 GPUs"),
        ("nowhere", 1, 1, "no room for rollout: 1 x 1 GPUs on nodes labelled nodes=nowhere within"),
    ],
)
def test_a_role_without_room_is_refused_and_gives_back_what_it_held(take, nodes, num_actors, gpus_each, said):
    placement = Placement(config(rollout_nodes=nodes), "cuda")
    with pytest.raises(ConfigError, match=said):
        placement.seats("rollout", num_actors, gpus_each)
    assert len(take(placement, "learner", 4, 1)) == 4


def test_a_cpu_run_on_a_cluster_with_gpus_must_be_meant():
    with pytest.raises(ConfigError, match="the Ray cluster has 4: set device=cuda or device=cpu"):
        Placement(RunConfig(device="auto"), "cpu")
    Placement(RunConfig(device="cpu"), "cpu")
