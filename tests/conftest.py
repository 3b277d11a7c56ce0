"""For every test: what is long is slow, too; and a Ray node with warm starts that the runs of a test process share."""

import os

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "token")  # as ray.init has it; Ray reads it once, when it is imported


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def ray_node():
    """The environment in which a run joins it: Ray's own processes cost more to start than a tiny run's steps."""
    from opsd.cluster.warm import warm_start
    from opsd.config.engine import RolloutConfig
    from opsd.engines.vllm import engine_environment
    from tests.ray_node import ray_node

    roles = ("vllm", "transformers", "learner")
    with ray_node() as environment, warm_start(roles, engine_environment(RolloutConfig(), "cpu")):
        yield environment


@pytest.fixture(scope="module")
def joined(ray_node):
    """The runs of this module join the shared node."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ray_node.items():
            patch.setenv(name, value)
        yield
