"""A folder that cannot be written to is refused before anything is loaded, and nothing is left of the try."""

import errno
import os

import pytest

from opsd.config import paths
from opsd.config.paths import require_ray_token, require_writable
from opsd.errors import ConfigError


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("file", r"output_dir=\S+/file is a file$"),
        ("file/run/deep", r"output_dir=\S+/file/run/deep lies below \S+/file, which is a file$"),
        ("x" * 300, "is too long for a file's name$"),
        ("new/" + "x" * 300 + "/run", "is too long for a file's name$"),
        ("/".join(["deep"] * 1000), "is too long for a file's name$"),
        ("dangling", "nothing can be written there: No such file or directory$"),
        ("dangling/run", "nothing can be written there: No such file or directory$"),
        ("/proc/opsd", "output_dir=/proc/opsd: nothing can be written there: "),
    ],
)
def test_a_folder_that_cannot_be_is_refused(tmp_path, path, said):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=said):
        require_writable("output_dir", tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["dangling", "file"]


def test_a_disk_that_takes_nothing_is_named(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(paths.tempfile, "mkdtemp", refuse)
    with pytest.raises(ConfigError, match="/run: nothing can be written there: Read-only file system$"):
        require_writable("output_dir", tmp_path / "run")


def test_a_home_in_which_ray_cannot_keep_its_token_is_named(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc")
    with pytest.raises(ConfigError, match="^HOME=/proc/.ray: nothing can be written there: .* Ray keeps its token"):
        require_ray_token()
    for name, value in (("RAY_AUTH_TOKEN", "secret"), ("RAY_AUTH_TOKEN_PATH", "file"), ("RAY_AUTH_MODE", "disabled")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            require_ray_token()
    monkeypatch.setenv("HOME", str(tmp_path))
    require_ray_token()
    assert os.listdir(tmp_path) == []
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    monkeypatch.setattr(paths.tempfile, "mkdtemp", None)  # what is there need not be written
    require_ray_token()


def test_a_folder_that_can_be_is_not_made(tmp_path):
    (tmp_path / "there").mkdir()
    for path in ("there", "there/run", "new/deep/run"):
        require_writable("output_dir", tmp_path / path)
    assert os.listdir(tmp_path) == ["there"] and os.listdir(tmp_path / "there") == []
