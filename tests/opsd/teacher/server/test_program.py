"""What a server refuses before it loads a model: one message that names the setting."""

import re
import socket
from pathlib import Path

import pytest

from opsd.config.engine import TeacherConfig
from opsd.errors import ConfigError
from opsd.models.facts import tokens_digest, weights_fingerprint
from opsd.teacher.server.config import ServerConfig
from opsd.teacher.server.program import listen, serve
from tests.tiny_models import make_char_tokenizer, make_tiny_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_tiny_qwen3(tmp_path_factory.mktemp("model"), tied=True, seed=0, eos_token_id=0)
    return str(make_char_tokenizer(path, eos_token_id=0))


@pytest.mark.parametrize(
    ("settings", "teacher", "said"),
    [
        ({"host": "0.0.0.0"}, {}, "host=0.0.0.0 can be reached from other machines, so a token must be asked for"),
        ({"port": 70000}, {}, r"port must be in \[0, 65535\], got 70000"),
        ({"port": -1}, {}, r"port must be in \[0, 65535\], got -1"),
        ({"max_connections": 0}, {}, "max_connections must be at least 1, got 0"),
        ({"transfer_timeout_s": 0.0}, {}, "transfer_timeout_s must be greater than 0"),
        ({"max_held_mib": 63}, {}, "max_held_mib must be at least 64, got 63"),
        ({"max_queued": 0}, {}, "max_queued must be at least 1, got 0"),
        ({"token_file": "/no/token"}, {}, "token_file=/no/token: there is no such file"),
        ({}, {"path": "/no/such/model"}, "teacher.path=/no/such/model: there is no model here"),
        ({}, {"num_workers": 2}, "teacher.num_workers=2: a server has one engine"),
        ({}, {"follow_decay": 0.5}, "teacher.follow_decay is not for a server"),
        ({}, {"by_source": {"x": "/m"}}, "teacher.by_source is not for a server"),
        ({}, {"backend": "http", "urls": ["http://a"]}, "teacher.backend must be one of vllm, transformers"),
    ],
)
def test_a_server_that_cannot_start_says_why(model, monkeypatch, settings, teacher, said):
    monkeypatch.delenv("OPSD_TEACHER_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=said):
        serve(ServerConfig(**{"port": 0, **settings}, teacher=TeacherConfig(**{"path": model, **teacher})))


def test_a_port_in_use_is_named(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port}: cannot listen there: Address already in use"):
            serve(ServerConfig(port=port, teacher=TeacherConfig(path=model)))


@pytest.mark.parametrize("host", ["x" * 300, "a..b", "a\0b", "256.0.0.1.2"])
def test_a_host_that_no_address_can_be_is_named(host):
    with pytest.raises(ConfigError, match="port=0: cannot listen there: ") as caught:
        listen(host, 0)
    assert str(caught.value).startswith(f"host={host}")


def test_the_limits_that_are_documented_are_those_of_the_settings():
    page = (Path(__file__).parents[4] / "SECURITY.md").read_text()
    rows = re.findall(r"^\| (`[a-z].*?) \| (.*?) \|", page[page.index("## Limits") :], re.MULTILINE)
    said = {name: text for names, text in rows for name in re.findall(r"`([\w.]+)`", names)}
    settings = {**vars(ServerConfig()), "teacher.top_k": TeacherConfig().top_k}
    bounds = {name for name in settings if name.endswith("_s") or name.startswith("max_")} - {"max_merged_tokens"}
    assert said.keys() == {*bounds, "teacher.top_k"}
    assert [name for name, text in said.items() if f"{settings[name]:g}" not in re.findall(r"\d+", text)] == []


def test_models_that_differ_have_other_fingerprints(model, tmp_path):
    make_tiny_qwen3(tmp_path / "same", tied=True, seed=0, eos_token_id=0)
    make_tiny_qwen3(tmp_path / "other", tied=True, seed=1, eos_token_id=0)
    assert weights_fingerprint(model) == weights_fingerprint(tmp_path / "same")
    assert weights_fingerprint(model) != weights_fingerprint(tmp_path / "other")
    assert tokens_digest(("a", "b", None)) != tokens_digest(("a", None, "b"))
