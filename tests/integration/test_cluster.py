"""Two Ray nodes on this machine, started by scripts/ray_cluster.sh: ports, folders, labels and a token of their own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from tests.integration.runs import TRANSFORMERS, finished, losses, train_as_a_user, weights
from tests.ray_node import FREE_PORTS, PATH, ROOT, SMALL

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "scripts" / "ray_cluster.sh"


class Node:
    """One Ray node; its folder is short, since Ray puts sockets into it."""

    def __init__(self, token):
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))
        self.environment = {
            **os.environ,
            "PATH": PATH,
            "RAY_CLUSTER_DIR": str(self.folder),
            "RAY_AUTH_TOKEN_PATH": str(token),
        }

    def run(self, *arguments):
        return subprocess.run(
            ["bash", SCRIPT, *arguments], env=self.environment, capture_output=True, text=True, timeout=400
        )

    def start(self, *arguments):
        process = self.run(*arguments, *FREE_PORTS, *SMALL)
        assert process.returncode == 0, process.stdout + process.stderr
        return (self.folder / "ray_current_cluster").read_text()

    def processes(self):
        """Of this node, by its folder on their command lines or in their environment."""
        found = []
        for proc in Path("/proc").glob("[0-9]*"):
            try:
                text = (proc / "cmdline").read_bytes() + (proc / "environ").read_bytes()
            except OSError:
                continue
            if str(self.folder).encode() in text and int(proc.name) != os.getpid():
                found.append(int(proc.name))
        return found

    def end(self):
        self.run("stop")
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """(head, worker, address): the learner's node and the engines'."""
    token = tmp_path_factory.mktemp("secret") / "token"
    head, worker = Node(token), Node(token)
    try:
        address = head.start(
            "head", "--port=0", "--dashboard-port=0", "--labels=nodes=train", "--node-ip-address=127.0.0.1"
        )
        worker.start("worker", address, "--labels=nodes=engines")
        yield head, worker, address
    finally:
        worker.end()
        head.end()


@pytest.fixture
def in_the_cluster(nodes, monkeypatch):
    """The environment in which a run joins it. The run is a process of its own: Ray reads its token once."""
    head, _, address = nodes
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", head.environment["RAY_AUTH_TOKEN_PATH"])


def nodes_of_actors(address):
    """Name -> the label of its node, of every actor that the cluster has had."""
    script = (
        "import json, ray; ray.init(logging_level='ERROR')\n"
        "labels = {node['NodeID']: node['Labels'].get('nodes') for node in ray.nodes()}\n"
        "actors = ray._private.state.actors().values()\n"
        "print(json.dumps({actor['Name']: labels.get(actor['Address']['NodeID']) for actor in actors}))"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


def test_engines_on_one_node_and_the_learner_on_the_other_train_as_on_one_machine(
    pair, tmp_path, nodes, in_the_cluster
):
    on_two = tmp_path / "two"
    process = train_as_a_user(
        pair, on_two, "num_steps=3", *TRANSFORMERS, "placement.learner_nodes=train", "placement.rollout_nodes=engines",
        "placement.teacher_nodes=engines",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    where = nodes_of_actors(nodes[2])
    assert where == {"rollout-0": "engines", "teacher-0": "engines", "learner-0": "train"}
    with pytest.MonkeyPatch.context() as alone:
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            alone.delenv(name)
        on_one = finished(pair, tmp_path / "one", "num_steps=3", *TRANSFORMERS)
    assert losses(on_two) == losses(on_one)
    two, one = weights(on_two), weights(on_one)
    assert all(torch.equal(two[name], one[name]) for name in one)


OCCUPY = """
import ray, time
from ray.util.placement_group import placement_group
ray.init(logging_level="ERROR")
groups = [placement_group([{"CPU": 0.9975}], bundle_label_selector=[{"nodes": name}]) for name in ("train", "engines")]
ray.get([group.ready() for group in groups])
print("full", flush=True)
time.sleep(3600)
"""


@pytest.mark.long
def test_a_learner_rank_on_each_of_two_nodes_loses_nothing(pair, tmp_path, nodes, in_the_cluster):
    """Each node has room for two actors: an engine, whose node is named, and one of the ranks."""
    ranks = ("num_steps=3", "learner.num_workers=2", *TRANSFORMERS)
    occupier = subprocess.Popen([sys.executable, "-c", OCCUPY], stdout=subprocess.PIPE, text=True)
    try:
        assert occupier.stdout.readline() == "full\n"
        process = train_as_a_user(
            pair, tmp_path / "two", *ranks, "placement.rollout_nodes=train", "placement.teacher_nodes=engines"
        )
    finally:
        occupier.kill()
        occupier.wait()
    assert process.returncode == 0, process.stderr[-4000:]
    where = nodes_of_actors(nodes[2])
    assert {where["learner-0"], where["learner-1"]} == {"train", "engines"}
    with pytest.MonkeyPatch.context() as alone:
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN_PATH"):
            alone.delenv(name)
        on_one = finished(pair, tmp_path / "one", *ranks)
    assert losses(tmp_path / "two") == losses(on_one)
    two, one = weights(tmp_path / "two"), weights(on_one)
    assert all(torch.equal(two[name], one[name]) for name in one)


def test_a_label_that_no_node_has_is_refused(pair, tmp_path, in_the_cluster):
    process = train_as_a_user(pair, tmp_path / "run", "placement.rollout_nodes=nowhere", "placement.wait_s=1")
    assert process.returncode == 2
    assert "error: placement: no room for rollout: 1 x a process on nodes labelled nodes=nowhere" in process.stderr
    assert "(nodes=train): 0 GPUs" in process.stderr and "(nodes=engines): 0 GPUs" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_driver_without_the_token_is_turned_away(pair, tmp_path, in_the_cluster, monkeypatch):
    wrong = tmp_path / "token"
    wrong.write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(wrong))
    monkeypatch.setenv("RAY_gcs_server_port_wait_time_s", "1")  # Ray asks once, not 20 times
    process = train_as_a_user(pair, tmp_path / "run")
    assert process.returncode == 2
    assert "its token is another than that of RAY_AUTH_TOKEN_PATH" in process.stderr
    assert "Traceback" not in process.stderr


def test_stop_ends_every_process_of_its_node_and_no_other(nodes):
    """Last of this file: the worker's node is gone after it."""
    head, worker, _ = nodes
    again = head.run("head")
    assert again.returncode == 2 and "runs Ray already" in again.stderr
    assert worker.processes()
    assert worker.run("stop").returncode == 0
    assert worker.processes() == []
    assert head.run("status").returncode == 0
    assert head.run("stop").returncode == 0
    assert head.processes() == []
    assert "runs no Ray" in head.run("status").stderr
