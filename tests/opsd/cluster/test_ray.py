"""What a run says before it starts anything on a node where it cannot run, and of workers that fail."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import ray
import torch

from opsd.cluster.ray import gather, ray_cluster, require_here, start_actor
from opsd.config.auto import resolve_device
from opsd.errors import ConfigError, DataError, StageError, WorkerLost


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
def test_a_node_of_ray_that_misses_its_time_is_started_once_more(num_failures, tmp_path, monkeypatch, capsys):
    calls = []

    def init(**_options):
        calls.append(1)
        if len(calls) <= num_failures:
            raise Exception("\nThe current node timed out during startup.\nA second line.")
        return SimpleNamespace(dashboard_url="127.0.0.1:1", address_info={"session_dir": str(tmp_path)})

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


class Results:
    """Stands for Ray: results that come in rounds, errors among them. A reference is a worker's number."""

    def __init__(self, monkeypatch, *rounds):
        self.rounds = [dict(each) for each in rounds]
        self.come, self.waited = {}, []
        monkeypatch.setattr(ray, "wait", self.wait)
        monkeypatch.setattr(ray, "get", self.get)

    def wait(self, refs, num_returns=1, timeout=None):
        self.waited.append(timeout)
        if self.rounds:
            self.come.update(self.rounds.pop(0))
        assert timeout is not None or any(ref in self.come for ref in refs), "it would wait for ever"
        ready = [ref for ref in refs if ref in self.come][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def get(self, ref):
        if isinstance(self.come[ref], Exception):
            raise self.come[ref]
        return self.come[ref]


def failed(error):
    """As a worker's exception arrives."""
    where = 'Traceback (most recent call last):\n  File "/code/opsd/learner/step.py", line 41, in train_step\n'
    return ray.exceptions.RayTaskError("train_step", f"{where}{type(error).__name__}: {error}", error, "p", 1, "ip")


KILLED = ray.exceptions.RayActorError(
    error_msg="The actor died unexpectedly before finishing this task.\n\tclass_name: LearnerWorker\n\tactor_id: 1b2c\n"
    "\tpid: 4711\n\tname: learner-1\n\tnamespace: opsd-1\n\tip: 10.0.0.7\nThe actor is dead because its worker process "
    "has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error "
    "code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory "
    "usage, (2) ray stop --force was called."
)
PEER_IS_GONE = failed(RuntimeError("[../gloo/pair.cc:547] Connection closed by peer [10.0.0.7]:33891"))


def test_results_come_in_the_order_of_the_workers(monkeypatch):
    Results(monkeypatch, {2: "c"}, {0: "a"}, {1: "b"})
    assert gather("learn", [0, 1, 2]) == ["a", "b", "c"]
    assert gather("learn", []) == []


@pytest.mark.parametrize("error", [ConfigError("no head"), DataError("NaN"), StageError("mixed")])
def test_one_rank_s_own_error_ends_the_wait_for_the_others(monkeypatch, error):
    """Rank 0 waits in a collective for ever."""
    results = Results(monkeypatch, {1: failed(error)})
    with pytest.raises(type(error), match=f"^{error}$"):
        gather("learn", [0, 1])
    assert results.waited == [None]


@pytest.mark.parametrize("rounds", [({0: PEER_IS_GONE}, {1: KILLED}), ({1: KILLED},), ({0: PEER_IS_GONE, 1: KILLED},)])
def test_a_worker_that_was_killed_is_named_and_not_the_one_that_missed_it(monkeypatch, rounds):
    Results(monkeypatch, *rounds)
    with pytest.raises(WorkerLost) as raised:
        gather("learn", [0, 1])
    assert str(raised.value) == (
        "learn: worker 1 was lost: Worker unexpectedly exits with a connection error code 2. End of file. (pid: 4711, "
        "name: learner-1, ip: 10.0.0.7)"
    )


# Ray's own, with fewer of its lines; it names the largest processes of the node after all else.
LOW_ON_MEMORY = (
    "4 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: ee2c) was "
    "22.39GB used / 23.54GB limit (0.951042)\nOOM kill reason: Memory usage 24026091520B exceeded threshold of "
    "24012687360B (95.0% of 25276514304B limit)\nObject store memory usage: [- objects spillable: 0\n]\n"
    "Total non-selected idle workers: 2\nTo see more information about memory usage on this node, use `ray logs "
    "raylet.out -ip 127.0.0.1`\nTop 10 memory users: PID\tMEM(GB)\tCOMMAND\n25777\t3.19\tray::LearnerWorker.train_on\n"
    "25107\t2.82\tray::LearnerWorker\n24553\t2.21\tray::EngineWorker.update_weights\n18709\t0.48\tpython -m tip.train\n"
    "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/. Consider provisioning "
    "more memory on this node or reducing task parallelism by requesting more CPUs per task."
)


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.OutOfMemoryError(LOW_ON_MEMORY),
        ray.exceptions.RayActorError(
            error_msg=f"The actor died unexpectedly before finishing this task.\n\tpid: 4711\n\tname: learner-1\nThe "
            f"actor is dead because its worker process died. Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: "
            f"{LOW_ON_MEMORY}"
        ),
    ],
)
def test_a_worker_that_its_node_had_no_memory_for_is_told_as_that(monkeypatch, error):
    Results(monkeypatch, {1: error})
    with pytest.raises(WorkerLost) as raised:
        gather("learn", [0, 1])
    assert str(raised.value) == (
        "learn: worker 1 was lost: its node ran low on memory, 22.39GB used of 23.54GB, and Ray ended it; the largest: "
        "ray::LearnerWorker.train_on with 3.19 GB, ray::LearnerWorker with 2.82 GB, ray::EngineWorker.update_weights "
        "with 2.21 GB"
    )


def test_any_other_error_is_a_line_with_its_place(monkeypatch):
    Results(monkeypatch, {0: failed(IndexError("index 9\nis out of bounds"))})
    with pytest.raises(StageError) as raised:
        gather("rollout", [0, 1], workers=[4, 5])
    assert str(raised.value) == (
        "rollout: worker 4 failed: IndexError: index 9 is out of bounds (in train_step, /code/opsd/learner/step.py, "
        "line 41)"
    )


class Rank:
    """An actor that fails in the way that it is told to."""

    def run(self, how):
        if how == "is killed":
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "misses the other":
            raise RuntimeError("Connection closed by peer")
        if how == "refuses":
            raise DataError("the weight w holds NaN")
        time.sleep(600)


@pytest.mark.slow
def test_what_ray_says_of_a_process_that_was_killed_is_one_line_and_no_rank_is_waited_for(joined):
    environment = {"OMP_NUM_THREADS": "1"}
    with ray_cluster(dashboard=False):
        ranks = [start_actor(Rank, f"learner-{i}", num_gpus=0, environment=environment) for i in range(2)]
        with pytest.raises(DataError, match="^the weight w holds NaN$"):
            gather("learn", [ranks[0].run.remote("waits"), ranks[1].run.remote("refuses")])
        ray.kill(ranks[0])
        other = start_actor(Rank, "learner-2", num_gpus=0, environment=environment)
        with pytest.raises(WorkerLost, match=r"^learn: worker 1 was lost: .*name: learner-1") as raised:
            gather("learn", [other.run.remote("misses the other"), ranks[1].run.remote("is killed")])
        assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 500


@pytest.mark.slow
def test_a_worker_that_hangs_counts_as_lost(joined):
    with ray_cluster(dashboard=False, answer_s=1.0):
        ranks = [start_actor(Rank, f"hung-{i}", num_gpus=0, environment={"OMP_NUM_THREADS": "1"}) for i in range(2)]
        with pytest.raises(WorkerLost, match=r"^learn: worker 3 has not answered for 1 s .placement.answer_s.$"):
            gather("learn", [each.run.remote("waits") for each in ranks], workers=[3])
