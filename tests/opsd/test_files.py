"""What a full disk or a kill leaves of a file is the file as it was."""

import errno
import os

import pytest

from opsd.files import file_sum, unlike, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("old", "new and longer", ""):
        write_whole(path, text)
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["config.yaml"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch, fails):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


def test_how_a_file_differs_from_what_was_written(tmp_path):
    path = tmp_path / "rank_0.safetensors"
    path.write_bytes(b"x" * 2000)
    wanted = file_sum(path)
    assert unlike(path, wanted) is None
    path.write_bytes(b"x" * 1999 + b"y")
    assert unlike(path, wanted, contents=False) is None
    assert unlike(path, wanted) == "rank_0.safetensors has other contents than were written"
    path.write_bytes(b"x" * 1500)
    assert unlike(path, wanted, contents=False) == "rank_0.safetensors has 1,500 bytes, 2,000 were written"
    path.unlink()
    assert unlike(path, wanted) == "rank_0.safetensors cannot be read (No such file or directory)"
