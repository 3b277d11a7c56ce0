"""What the learner's ranks are started with."""

import pytest

from opsd.learner.group import allocator_settings

GROWING = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("device", "shares_gpu", "own", "expected"),
    [
        ("cuda", False, None, GROWING),
        ("cuda", True, None, {}),
        ("cpu", False, None, {}),
        ("cuda", False, "PYTORCH_ALLOC_CONF", {}),
        ("cuda", False, "PYTORCH_CUDA_ALLOC_CONF", {}),
    ],
)
def test_a_gpus_memory_grows_in_segments_unless_it_is_shared_or_the_user_set_it(
    device, shares_gpu, own, expected, monkeypatch
):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    assert allocator_settings(device, shares_gpu) == expected
