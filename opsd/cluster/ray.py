"""Where the work runs: the Ray cluster, its named actors, and what becomes of their errors."""

from __future__ import annotations

import os
import re
import signal
import threading
import uuid
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray._private import ray_constants

from opsd.cluster.node_end import ended_with_driver
from opsd.cluster.reach import require_answer
from opsd.cluster.token_file import private_token_file
from opsd.cluster.warm import actor_search_path, warm_executable
from opsd.config.auto import joins_cluster
from opsd.errors import ConfigError, DataError, StageError, WorkerLost, say

OURS = (ConfigError, DataError, StageError)
LATE_S = 5.0  # after a failure that may be another's consequence: Ray takes a moment to notice a process that is gone
MAX_REASON = 300  # characters of what others say
FRAME = re.compile(r'File "(.+?)", line (\d+), in (\w+)')  # of a traceback
# Of what Ray says where it ends an actor to save its node: the memory of the node, and the table of who has most.
LOW_MEMORY = re.compile(r"was (\S+) used / (\S+) limit")
MEMORY_USERS = re.compile(r"^\d+\t([\d.]+)\t(.+)$", re.MULTILINE)

patience: dict[str, float | None] = {"answer_s": None}  # for one answer of a worker; None: for ever


@contextmanager
def ray_cluster(*, dashboard: bool, answer_s: float | None = None):
    """The Ray session: joins the cluster at RAY_ADDRESS or starts one here. Yields the dashboard's URL, or ''.

    `answer_s`: a worker that does not answer for so long counts as lost; None: it never does.
    Raises StageError where neither is possible, ConfigError where Ray's token cannot be kept from others.
    """
    if joins_cluster():
        require_answer(os.environ["RAY_ADDRESS"])
    os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's 15 any other process on the machine starves the run
    local: dict[str, Any] = {}
    if not joins_cluster():
        private_token_file()
        ray_constants.ENABLE_RAY_CLUSTER = False  # a node of its own: all ports, some of them open to all, on 127.0.0.1
        local = {"address": "local", "include_dashboard": dashboard, "dashboard_host": "127.0.0.1"}
        for name in ("RAY_gcs_server_port_wait_time_s", "RAY_DASHBOARD_STARTUP_TIMEOUT_S"):
            os.environ.setdefault(name, "120")  # a first start from a cold disk, or on a busy machine, takes over 30 s
        os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "2000")  # of its 100,000 a long run fills all
    context = _connect(local)
    # Ray's own handler prints its C++ stack and aborts: a job that its scheduler ends leaves as after Ctrl-C.
    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    patience["answer_s"] = answer_s
    try:
        with ended_with_driver(context.address_info["session_dir"]) if local else nullcontext():
            yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        patience["answer_s"] = None
        ray.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = True


def _connect(options: dict[str, Any]) -> Any:
    """ray.init; a node of its own is started twice: a busy machine misses Ray's 30 seconds, which are fixed."""
    for is_last in (True,) if joins_cluster() else (False, True):
        try:
            return ray.init(
                namespace=f"opsd-{uuid.uuid4().hex[:8]}", logging_level="ERROR", log_to_driver=False, **options
            )
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if "InvalidAuthToken" in f"{error} {error.__cause__}":
                reason = "its token is another than that of RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN here"
            if is_last:
                where = f"join the cluster at {os.environ['RAY_ADDRESS']}" if joins_cluster() else "start on this node"
                raise StageError(f"ray: could not {where}: {reason}") from error
            say(f"ray     {reason}; once more")


def start_actor(
    cls: type,
    name: str,
    *args: Any,
    num_gpus: int,
    environment: dict[str, str],
    seat: dict[str, Any] | None = None,
    beside: dict[str, int] | None = None,
    **kwargs: Any,
):
    """A Ray actor whose name the dashboard shows. It has the import path of `actor_search_path`.

    `seat`: where it runs, see opsd.cluster.placement; None: wherever Ray finds `num_gpus` GPUs. `beside`: names of
    concurrency groups with their numbers of threads, whose calls run beside the others.
    """
    executable = warm_executable(environment) if is_one_node() else None
    options = {
        "name": name,
        "num_cpus": 0,  # the roles take turns, so they may share the cores
        "num_gpus": num_gpus,
        "runtime_env": {
            "env_vars": {**environment, "PYTHONPATH": actor_search_path()},
            **({"py_executable": executable} if executable else {}),
        },
        **(seat or {}),
    }
    actor = ray.remote(concurrency_groups=beside)(cls) if beside else ray.remote(cls)
    return actor.options(**options).remote(*args, **kwargs)


def is_one_node() -> bool:
    """Whether the cluster is one node: on another the interpreter may have another path, and nothing is warm there."""
    return sum(node["Alive"] for node in ray.nodes()) == 1


def require_here(what: str, path: str | os.PathLike) -> None:
    """Called in an actor. Raises ConfigError where its node does not have this file or folder."""
    if not os.path.exists(path):
        raise ConfigError(
            f"{what} {path} is not on the node {ray.util.get_node_ip_address()}: put it on a file system that all "
            "nodes share, or a copy at the same path of each"
        )


def gather(stage: str, refs: Sequence[Any], workers: Sequence[int] | None = None) -> list[Any]:
    """The results in order. `workers`: the numbers of those who answer; None: 0, 1, ...

    Raises as soon as one has failed: the others may wait for it in a collective, and end with the run. A worker's own
    error of our kinds comes out as it is, any other as a StageError of one line that names the worker.
    """
    results: dict[int, Any] = {}
    failures: dict[int, ray.exceptions.RayError] = {}
    places, waiting = {ref: place for place, ref in enumerate(refs)}, list(refs)
    numbers = range(len(refs)) if workers is None else workers

    def wait(num_returns: int = 1, timeout: float | None = None) -> None:
        ready, waiting[:] = ray.wait(waiting, num_returns=num_returns, timeout=timeout)
        for ref in ready:
            try:
                results[places[ref]] = ray.get(ref)
            except ray.exceptions.RayError as error:
                failures[places[ref]] = error

    while waiting and not failures:
        still = len(waiting)
        wait(timeout=patience["answer_s"])
        if len(waiting) == still:
            raise no_answer(f"{stage}: worker {numbers[places[waiting[0]]]}")
    if waiting and not any(map(_is_cause, failures.values())):
        wait(num_returns=len(waiting), timeout=LATE_S)
    if not failures:
        return [results[place] for place in range(len(refs))]
    place = min(failures, key=lambda place: (not _is_cause(failures[place]), place))
    error = failures[place]
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, OURS):
        raise error.cause from None
    kind = StageError if isinstance(error, ray.exceptions.RayTaskError) else WorkerLost
    raise kind(f"{stage}: worker {numbers[place]} {_in_a_line(error)}") from error


def no_answer(who: str) -> WorkerLost:
    """What is raised where `patience` is at its end."""
    return WorkerLost(f"{who} has not answered for {patience['answer_s']:g} s (placement.answer_s)")


def _is_cause(error: ray.exceptions.RayError) -> bool:
    """Whether it needs no other to explain it. A rank that another one left alone fails with whatever gloo says."""
    return not isinstance(error, ray.exceptions.RayTaskError) or isinstance(error.cause, OURS)


def _in_a_line(error: ray.exceptions.RayError) -> str:
    if not isinstance(error, ray.exceptions.RayTaskError):
        return f"was lost: {_loss_in_a_line(str(error))}"
    frames = FRAME.findall(str(error))
    where = "in {2}, {0}, line {1}".format(*frames[-1]) if frames else "nowhere in Python"
    return f"failed: {type(error.cause).__name__}: {' '.join(str(error.cause).split())[:MAX_REASON]} ({where})"


def _loss_in_a_line(said: str) -> str:
    """Ray's ten lines about an actor that is gone: which one it was, and how it ended; or its fifty on low memory."""
    if low := LOW_MEMORY.search(said):
        largest = ", ".join(f"{command[:40].strip()} with {gib} GB" for gib, command in MEMORY_USERS.findall(said)[:3])
        return f"its node ran low on memory, {low[1]} used of {low[2]}, and Ray ended it; the largest: {largest}"
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["Ray does not say why"]
    facts = [line for line in lines if re.match(r"(name|pid|ip): ", line)]
    reason = lines[-1].rpartition("Worker exit detail: ")[2].partition(" Some common causes include")[0][:MAX_REASON]
    return f"{reason} ({', '.join(facts)})" if facts else reason
