"""A process that has imported what others need, from which they are forked: `python -m opsd.cluster.warm_process`.

    ... serve NUMBER MODULE...     imports the modules, then forks once per request to the listening socket of this file
                                   number, until its standard input ends
    ... fork SOCKET SCRIPT ARG...  is `python SCRIPT ARG...`, forked from the server, and ends with it; a process of
                                   its own where no server listens

The second stands in for the Python executable where Ray starts a worker (py_executable of a runtime environment).
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import sys

STANDARD = (0, 1, 2)  # the file descriptors that a forked process takes over


def serve(listener: socket.socket, modules: list[str]) -> None:
    """Requests that come during the imports wait in the socket's queue."""
    # Ray reads its environment once, when it is imported, and a worker's has the worker's job: each imports it anew.
    sys.modules["ray"] = None  # type: ignore[assignment]
    for name in modules:
        importlib.import_module(name)
    del sys.modules["ray"]
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a forked process that has ended leaves no zombie
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return become(connection)
        connection.close()
    shutil.rmtree(os.path.dirname(listener.getsockname()), ignore_errors=True)  # a killed driver leaves it behind


def become(connection: socket.socket) -> None:
    """In the forked process: runs what was asked for."""
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, len(STANDARD))
    connection.detach()  # open until the process ends, which is how the asker knows
    asked = json.loads(message)
    for standard, descriptor in zip(STANDARD, descriptors, strict=True):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*own, *(folder for folder in sys.path if folder not in own)]
    sys.argv = asked["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def fork(path: str, command: list[str]) -> None:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        os.execv(sys.executable, [sys.executable, *command])
    asked = {"command": command, "environment": dict(os.environ), "folder": os.getcwd()}
    socket.send_fds(connection, [json.dumps(asked).encode()], STANDARD)
    connection.recv(1)  # nothing is ever sent: it ends


if __name__ == "__main__":
    what, where, *rest = sys.argv[1:]
    serve(socket.socket(fileno=int(where)), rest) if what == "serve" else fork(where, rest)
