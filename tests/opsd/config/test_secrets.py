"""Where a token is read from, what is refused in its place, and that none is taken as a setting."""

import logging

import pytest

from opsd.config.http import check_url
from opsd.config.secrets import MOST_BYTES, read_token, refuse_secrets
from opsd.errors import ConfigError


def test_a_file_goes_before_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("A_TOKEN", " from-env ")
    (tmp_path / "token").write_text("from-file\n")
    assert read_token("", str(tmp_path / "token"), "A_TOKEN") == "from-file"
    assert read_token("", "", "A_TOKEN") == "from-env"
    assert read_token("", "", "NO_TOKEN") == ""


@pytest.mark.parametrize(
    ("holds", "said"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"\x7fELF\x00\xff", "must hold one token and nothing else"),
        (b"\xff\xfes\x003\x00", "must hold one token and nothing else"),
        ("s3cret-é".encode(), "must hold one token and nothing else"),
        (b"s3cret other", "must hold one token and nothing else"),
        (b"s3cret\nother\n", "must hold one token and nothing else"),
        (b"s3cret" * 10_000, "must hold one token and nothing else"),
        (None, "there is no such file"),
        ("folder", "there is no such file"),
    ],
)
def test_a_file_that_holds_no_token_is_named_and_never_quoted(tmp_path, holds, said):
    path = tmp_path / "token"
    if holds == "folder":
        path.mkdir()
    elif holds is not None:
        path.write_bytes(holds)
    with pytest.raises(ConfigError, match=said) as caught:
        read_token("teacher.http.", str(path), "NO_TOKEN")
    assert str(caught.value).startswith(f"teacher.http.token_file={path}")
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_no_file_can_have_and_the_longest_token(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        read_token("", "x" * 5000, "NO_TOKEN")
    (tmp_path / "token").write_text("x" * MOST_BYTES + "\n")
    assert read_token("", str(tmp_path / "token"), "NO_TOKEN") == "x" * MOST_BYTES


def test_a_variable_that_holds_no_token_is_named_and_never_quoted(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "s3cret\nother")
    with pytest.raises(ConfigError, match=r"^\$A_TOKEN must hold one token") as caught:
        read_token("", "", "A_TOKEN")
    assert "s3cret" not in str(caught.value)


def test_a_file_that_others_may_read_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    for name, mode in (("open", 0o644), ("own", 0o600)):
        (tmp_path / name).write_text("s3cret")
        (tmp_path / name).chmod(mode)
        for _ in range(3):
            read_token("", str(tmp_path / name), "NO_TOKEN")
    [line] = [record.getMessage() for record in caplog.records]
    assert "open: others on this machine may read it (mode 644): chmod 600" in line


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rollout.engine_args.hf_token", {"rollout": {"engine_args": {"hf_token": "s3cret"}}}),
        ("hook_options.token", {"hook_options": {"token": "s3cret"}}),
        ("loss.options.WANDB_API_KEY", {"loss": {"options": {"WANDB_API_KEY": "s3cret"}}}),
        (
            "teacher.engine_args.model_loader_extra_config.aws_secret_access_key",
            {"teacher": {"engine_args": {"model_loader_extra_config": {"aws_secret_access_key": "s3cret"}}}},
        ),
        ("teacher.by_source.maths.password", {"teacher": {"by_source": {"maths": {"password": "s3cret"}}}}),
    ],
)
def test_a_secret_among_the_settings_is_refused_and_never_quoted(name, settings):
    with pytest.raises(ConfigError) as caught:
        refuse_secrets(settings)
    assert str(caught.value).startswith(f"{name} looks like a secret") and "s3cret" not in str(caught.value)


def test_names_that_only_sound_like_it_are_settings():
    refuse_secrets({
        "token_env": "A_TOKEN", "token_file": "/a", "prompt_key": "question", "ignore_tokens": ["a"],
        "engine_args": {"hf_token": True, "max_num_batched_tokens": "8k", "pad_token": "<pad>"},
        "template_options": {"eos_token": "</s>"},
    })  # fmt: skip


@pytest.mark.parametrize(
    "url", ["http://me:s3cret@a:81", "ftp://me:s3cret@a:81", "http://me:s3cret@a:port", "me:s3cret@a:81"]
)
def test_a_password_in_an_address_is_never_quoted(url):
    with pytest.raises(ConfigError, match=r"must hold no user or password \(a:") as caught:
        check_url("teacher.urls", url)
    assert "s3cret" not in str(caught.value)
