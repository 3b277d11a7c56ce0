"""Where the work runs: the Ray cluster, its named actors, and what becomes of their errors."""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

from opsd.cluster.reach import require_answer
from opsd.cluster.token_file import private_token_file
from opsd.config.auto import joins_cluster
from opsd.errors import ConfigError, DataError, StageError, WorkerLost, say


@contextmanager
def ray_cluster(*, dashboard: bool):
    """The Ray session: joins the cluster at RAY_ADDRESS or starts one here. Yields the dashboard's URL, or ''.

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
    context = _connect(local)
    # Ray's own handler prints its C++ stack and aborts: a job that its scheduler ends leaves as after Ctrl-C.
    if threading.current_thread() is threading.main_thread():  # Python sets handlers nowhere else
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
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
    **kwargs: Any,
):
    """A Ray actor whose name the dashboard shows. It has the import path of `actor_search_path`.

    `seat`: where it runs, see opsd.cluster.placement; None: wherever Ray finds `num_gpus` GPUs.
    """
    options = {
        "name": name,
        "num_cpus": 0,  # the roles take turns, so they may share the cores
        "num_gpus": num_gpus,
        "runtime_env": {"env_vars": {**environment, "PYTHONPATH": actor_search_path()}},
        **(seat or {}),
    }
    return ray.remote(cls).options(**options).remote(*args, **kwargs)


def actor_search_path() -> str:
    """PYTHONPATH of an actor: the driver's own code first, then the folder that the command was started in.

    A user's hooks lie there, and so may another checkout, whose code must not run in half of the processes.
    """
    own = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([own, os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])


def require_here(what: str, path: str | os.PathLike) -> None:
    """Called in an actor. Raises ConfigError where its node does not have this file or folder."""
    if not os.path.exists(path):
        raise ConfigError(
            f"{what} {path} is not on the node {ray.util.get_node_ip_address()}: put it on a file system that all "
            "nodes share, or a copy at the same path of each"
        )


def gather(stage: str, refs: Sequence[Any]) -> list[Any]:
    """The results in order. An actor's own error of our kinds comes out as it is, any other as a StageError."""
    results = []
    for index, ref in enumerate(refs):
        try:
            results.append(ray.get(ref))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, (ConfigError, DataError, StageError)):
                raise error.cause from None
            raise StageError(f"{stage}: worker {index} failed: {error}") from error
        except ray.exceptions.RayError as error:
            raise WorkerLost(f"{stage}: worker {index} was lost: {error}") from error
    return results
