"""Warm starts on the CPU: a run's actors are forked from one process that has imported their libraries already.

Torch, transformers and vLLM take 7 to 13 seconds of a core to import, and a run has three roles at least. One process
imports them once, beside the checks of the configuration and the start of Ray. See opsd.cluster.warm_process.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PROGRAM = "opsd.cluster.warm_process"
TRANSFORMERS = ("torch", "transformers.models.auto.modeling_auto")
IMPORTS = {
    "transformers": TRANSFORMERS,
    "vllm": (*TRANSFORMERS, "vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.model_loader"),
    "learner": (*TRANSFORMERS, "torch.distributed.fsdp", "torch.distributed.tensor"),
}


class _Warm:
    """The process that there is, if any: the path of its socket, and the environment in which it has imported."""

    path = ""
    environment: Mapping[str, str] = {}


@contextmanager
def warm_start(roles: Iterable[str], environment: Mapping[str, str]) -> Iterator[None]:
    """Within the block, `warm_executable` answers. `roles`: of IMPORTS, others are passed over.

    `environment`: of the roles' processes, as far as their libraries read it when they are imported. A block within
    another has the other's process.
    """
    if _Warm.path:
        yield
        return
    modules = dict.fromkeys(name for role in roles for name in IMPORTS.get(role, ()))
    # The user's alone, for who reaches the socket runs code. Below /tmp: the path of a socket has 107 bytes at most.
    with TemporaryDirectory(prefix="opsd-", dir="/tmp") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = os.path.join(folder, "warm")
        listener.bind(path)
        listener.listen(128)
        process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, "serve", str(listener.fileno()), *modules],
            env={**os.environ, **environment, "PYTHONPATH": actor_search_path()},
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # its end is the process's
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # what cannot be imported is said by the actor that needs it
            start_new_session=True,  # Ctrl-C is the driver's
        )
        listener.close()
        _Warm.path, _Warm.environment = path, environment
        try:
            yield
        finally:
            _Warm.path = ""
            process.kill()
            process.communicate()


def warm_executable(environment: Mapping[str, str]) -> str | None:
    """What Ray starts a worker of this environment with, to be forked; None: as ever, nothing has imported for it."""
    known = _Warm.environment
    if not _Warm.path or any(known.get(name, value) != value for name, value in environment.items()):
        return None
    return shlex.join([sys.executable, "-m", PROGRAM, "fork", _Warm.path])


def actor_search_path() -> str:
    """PYTHONPATH of an actor: the driver's own code first, then the folder that the command was started in.

    A user's hooks lie there, and so may another checkout, whose code must not run in half of the processes.
    """
    own = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([own, os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
