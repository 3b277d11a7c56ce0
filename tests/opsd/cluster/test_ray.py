"""What a run says before it starts anything on a node where it cannot run."""

from types import SimpleNamespace

import pytest
import ray
import torch

from opsd.cluster.ray import ray_cluster, require_here
from opsd.config.auto import resolve_device
from opsd.errors import ConfigError, StageError


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_is_refused_here_and_left_to_the_cluster_where_the_run_joins_one(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="device=cuda, but this machine shows no CUDA device"):
        resolve_device("cuda")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert resolve_device("cuda") == "cuda"
    assert resolve_device("auto") == "cpu"


def test_a_folder_that_only_other_nodes_have_is_named_with_the_node(tmp_path):
    require_here("output_dir", tmp_path)
    with pytest.raises(
        ConfigError, match=r"output_dir .*/gone is not on the node \d+\.\d+\.\d+\.\d+: put it on a file"
    ):
        require_here("output_dir", tmp_path / "gone")


@pytest.mark.parametrize("num_failures", [0, 1, 2])
def test_a_node_of_ray_that_misses_its_time_is_started_once_more(num_failures, monkeypatch, capsys):
    calls = []

    def init(**_options):
        calls.append(1)
        if len(calls) <= num_failures:
            raise Exception("\nThe current node timed out during startup.\nA second line.")
        return SimpleNamespace(dashboard_url="127.0.0.1:1")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    if num_failures == 2:
        with (
            pytest.raises(StageError, match="ray: could not start on this node: The current node timed out"),
            ray_cluster(dashboard=True),
        ):
            pass
    else:
        with ray_cluster(dashboard=True) as url:
            assert url == "http://127.0.0.1:1"
    assert len(calls) == min(2, num_failures + 1)
    assert capsys.readouterr().err.count("once more") == min(1, num_failures)
