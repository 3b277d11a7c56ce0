"""Ray nodes for tests: processes and folders of their own, on free ports, ended with what started them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RAY = Path(sys.executable).with_name("ray")
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
FREE_PORTS = [
    "--node-manager-port=0",
    "--object-manager-port=0",
    "--dashboard-agent-listen-port=0",
    "--min-worker-port=0",
    "--max-worker-port=0",
]
SMALL = ["--num-cpus=1", f"--object-store-memory={200 << 20}"]
# A cluster that does not grow and whose actors' output nobody reads.
NOTHING_ELSE = ["--include-dashboard=false", "--include-log-monitor=false", "--no-monitor", "--disable-usage-stats"]
START_S = 300


@contextmanager
def ray_node() -> Iterator[dict[str, str]]:
    """A node of its own, with which a run does without starting Ray. Yields the environment in which it is joined."""
    if not (Path.home() / ".ray" / "auth_token").exists():  # ray.init makes it, ray start asks for it
        subprocess.run([RAY, "get-auth-token", "--generate"], check=True, capture_output=True)
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: Ray puts sockets into it
    command = [RAY, "start", "--head", "--block", "--port=0", "--temp-dir", folder]
    command += ["--node-ip-address=127.0.0.1", *FREE_PORTS, *SMALL, *NOTHING_ELSE]
    environment = {
        **os.environ,
        "PATH": PATH,
        "RAY_worker_niceness": "0",  # as opsd.cluster.ray has it
        "RAY_prestart_worker_first_driver": "0",  # every actor's process is one of its own
        "RAY_gcs_server_port_wait_time_s": "120",
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        address, deadline = folder / "ray_current_cluster", time.monotonic() + START_S
        while not (address.exists() and address.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
            time.sleep(0.1)
        yield {"RAY_ADDRESS": address.read_text()}
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
