"""Secrets that a run's environment holds are nowhere in what it leaves, prints or tells Ray."""

import pytest

import opsd.engines.actors
import opsd.learner.group
from tests.integration.runs import train
from tests.teacher_servers import teacher_server
from tests.tiny_models import make_tiny_pair

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("joined")]
SECRETS = {
    "OPSD_TEACHER_TOKEN": "teacher-s3cret-0123456789",
    "WANDB_API_KEY": "a3cre7" * 6 + "abcd",  # of the length that wandb asks for
    "HF_TOKEN": "hf_s3cretHub0123456789",
    "AWS_SECRET_ACCESS_KEY": "aws-s3cret-0123456789",
    "MY_PASSWORD": "own-s3cret-0123456789",
}


@pytest.fixture
def told(monkeypatch):
    """What every actor is started with, as Ray shows it."""
    found = []
    for module in (opsd.engines.actors, opsd.learner.group):

        def start(cls, name, *args, own=module.start_actor, **options):
            found.append((name, options["environment"]))
            return own(cls, name, *args, **options)

        monkeypatch.setattr(module, "start_actor", start)
    return found


def test_no_secret_of_the_environment_is_left_printed_or_told(tmp_path, monkeypatch, told):
    make_tiny_pair(tmp_path)
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    output_dir = tmp_path / "run"
    with teacher_server(tmp_path / "teacher", token=SECRETS["OPSD_TEACHER_TOKEN"]) as server:
        run = train(
            tmp_path, output_dir, "teacher.path=", "teacher.backend=http", f"teacher.urls=[{server.url}]",
            "rollout.backend=transformers", "log.wandb=auto", "num_steps=2",
        )  # fmt: skip
        printed = run.stdout + run.stderr + "".join(server.output)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "HTTP Request" not in printed
    assert {name for name, _ in told} == {"rollout-0", "teacher-0", "learner-0"}
    files = [path for path in output_dir.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.yaml", "metrics.jsonl", "report.html", "summary.json"} <= names
    assert any(name.endswith(".wandb") for name in names), names
    assert any(server.url.encode() in path.read_bytes() for path in files)  # as any setting is
    for name, secret in SECRETS.items():
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == [], name
        assert secret not in printed and secret not in repr(told), name
