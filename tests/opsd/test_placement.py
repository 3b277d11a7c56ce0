"""What a run says before it starts anything on a node where it cannot run."""

import pytest
import torch

from opsd.errors import ConfigError
from opsd.placement import require_here, resolve_device


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
