"""Ray's token lies where its owner alone may read it."""

import os
import re
import stat

import pytest

from opsd.cluster.token_file import private_token_file
from opsd.errors import ConfigError


@pytest.fixture
def token(tmp_path, monkeypatch):
    """Where Ray looks for it in an empty home; the umask hides nothing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    umask = os.umask(0)
    yield tmp_path / ".ray" / "auth_token"
    os.umask(umask)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_made_where_there_is_none_and_kept(token):
    private_token_file()
    made = token.read_text()
    assert re.fullmatch("[0-9a-f]{64}", made) and mode_of(token) == 0o600
    private_token_file()
    assert token.read_text() == made


def test_one_that_others_may_read_is_hidden(token):
    token.parent.mkdir()
    token.write_text("of an earlier run")
    token.chmod(0o644)
    private_token_file()
    assert (token.read_text(), mode_of(token)) == ("of an earlier run", 0o600)


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/x"), ("RAY_AUTH_MODE", "disabled")]
)
def test_none_is_made_where_the_user_has_seen_to_it(token, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    private_token_file()
    assert not token.parent.exists()


def test_a_home_that_cannot_hold_it_is_one_line(token):
    token.parent.write_text("a file in the folder's place")
    with pytest.raises(
        ConfigError, match=r"auth_token holds ray's token and must be a file .*: (File exists|Not a dir)"
    ):
        private_token_file()
