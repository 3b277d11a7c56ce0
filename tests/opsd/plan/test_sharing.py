"""placement.mode=colocated: the plan's sum is asked before a run starts, where the machine has a GPU to ask of."""

from types import SimpleNamespace

import pytest
import torch

from opsd.errors import ConfigError
from opsd.plan.memory import GIB
from opsd.plan.sharing import require_shared_room
from tests.opsd.plan.jobs import gpu_job

SHARES = {name: {"gpu_memory_utilization": 0.35, "num_workers": 4} for name in ("rollout", "teacher")}


@pytest.fixture
def config(monkeypatch):
    """The run's config on a machine whose first GPU has so much memory; 0: it has none."""

    def on(gib, **sections):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gib > 0)
        properties = SimpleNamespace(total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return gpu_job(**sections).cfg

    return on


def test_what_fits_passes_and_what_does_not_is_one_sentence(config):
    require_shared_room(config(80, placement={"mode": "colocated"}, **SHARES))
    with pytest.raises(ConfigError, match=r"^placement.mode=colocated: a GPU needs .* lower rollout.gpu_memory_util"):
        require_shared_room(config(40, placement={"mode": "colocated"}, **SHARES))


def test_separate_roles_and_a_driver_without_a_gpu_are_not_asked(config):
    require_shared_room(config(40, **SHARES))
    require_shared_room(config(0, placement={"mode": "colocated"}, **SHARES))
